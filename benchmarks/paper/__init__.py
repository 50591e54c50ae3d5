"""The paper's comparison (arXiv 2602.24208, Tables 1 to 3) on the models it was made on; docs/paper.md says how."""
