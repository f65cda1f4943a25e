"""The ``loramem`` command: parse, call loramem, print."""
