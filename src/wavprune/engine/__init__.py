"""What happens in one pruning: layers, plan, stages."""
