"""The `holdfast` command: a client of the API over HTTPS, and the maker of seeds."""
