"""The host's configuration: one typed document, its seed form, where it is found and how it is applied."""
