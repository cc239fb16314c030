"""The four experiments of Express Language Modeling (arXiv 2606.10944), with our cache."""
