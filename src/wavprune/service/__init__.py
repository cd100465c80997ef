"""A service that prunes models over HTTP, and a page in front of it; ``wavprune serve``."""
