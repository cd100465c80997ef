"""Callbacks for the training loops of other libraries, under the names that users import."""
