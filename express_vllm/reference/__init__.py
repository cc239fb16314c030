"""The oracle: halving, streaming cache and weighted attention in plain torch, slow and obvious."""
