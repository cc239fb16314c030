"""The GPU path: Model Runner V2's metadata, one layer's forward pass, warm-up."""
