"""Exports, tables, pictures and the report page of results."""
