"""Sequential CIFAR-10: images read pixel by pixel (Table 3 of the paper)."""
