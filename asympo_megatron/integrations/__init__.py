"""Adapters: the objectives inside the training stacks of others. One module a framework.

Importing an adapter loads torch and, where it subclasses or registers something, its framework; importing this
package loads neither.
"""
