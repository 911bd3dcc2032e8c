"""nano_adrpo: a minimal reference implementation of ADRPO (arXiv 2510.18053). Read examples/gaussian.py first."""
