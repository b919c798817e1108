"""Character-level language modelling on the Penn Treebank (Table 3 of the paper)."""
