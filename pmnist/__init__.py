"""Sequential and permuted MNIST: images read pixel by pixel (Table 3 of the paper)."""
