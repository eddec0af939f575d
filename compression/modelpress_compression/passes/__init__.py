"""The techniques, one package each. A pass never imports another pass."""
