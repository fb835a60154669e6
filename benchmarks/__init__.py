"""Measurements of this program and its peers. Cases take turns within one run, because machines drift."""
