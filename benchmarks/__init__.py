"""Measurements of this program. Contestants take turns within one run, because machines drift; ratios count."""
