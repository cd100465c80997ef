"""What a pruned network is worth."""
