"""A video server: an HTTP API in the shape of OpenAI's, a store of jobs, and worker processes with a session
each.

store.py keeps jobs, worker.py makes their videos, supervisor.py replaces workers, app.py answers requests.
"""
