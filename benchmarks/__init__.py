"""Measurements of this program and its peers. Cases are interleaved within one run, because machines drift."""
