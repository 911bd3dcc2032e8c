"""nano_adrpo: a minimal reference implementation of ADRPO (arXiv 2510.18053). Start reading at adrpo.py."""
