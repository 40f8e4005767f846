"""Programs that let a client library work on a task. They run in .venv-clients and import nothing else of this project.

Each takes a JSON file (see task.py), gives the task to the library's own agent loop, and writes what happened.
"""
