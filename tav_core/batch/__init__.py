"""Many clips on many machines: each clip of a list is an edit of its own (`run_edit`), and Ray hands them out.

Nothing is imported here: Ray is an optional extra, and no other command needs it.
"""
