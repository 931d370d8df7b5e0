"""The ``glm5`` command: ``main.py`` dispatches, every other module is one subcommand."""
