"""How ops run: launching, autograd nodes, operators for torch.compile, argument checks."""
