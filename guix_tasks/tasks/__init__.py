"""The tasks, thin, and the root collection."""

from invoke.collection import Collection

from guix_tasks.tasks import buildkit, develop, lifecycle, local

ns = Collection.from_module(lifecycle)
for collection in (*local.collections, buildkit.buildx):
    ns.add_collection(collection)
for task in (*local.tasks, develop.demo, develop.test):
    ns.add_task(task)
