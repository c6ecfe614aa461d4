"""What a user of each client does with a running server of the embedded model. Run by scripts.check_clients."""
