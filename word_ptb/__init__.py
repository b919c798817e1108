"""Word-level language modelling on the Penn Treebank (Table 1 of the paper)."""
