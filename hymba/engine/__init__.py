"""The one engine that generates, for the command line, servers, evaluations and the Python API."""
