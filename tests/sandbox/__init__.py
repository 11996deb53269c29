"""A machine in a file: whole-disk images with a real cOS layout, and container images to upgrade to.

Used by the tests and by `./cos demo`. Everything is made by the real tools (sfdisk, mke2fs) in plain files;
no disk of the machine is touched and no mount is needed.
"""
