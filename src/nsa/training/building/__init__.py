"""`nsa corpus`: a training corpus made of packages, by name, with the ordinary clients of their registries.

packages.csv   which packages, at which version, under which licence, and which of them are held out
table.py       reads it
download.py    pip and apt-get, run for one package
members.py     the files inside a wheel or a Debian package, nothing of which is run or unpacked to disk
text.py        which of them are text that someone wrote, and that text
build.py       the corpus: each file once, the files of a package joined, the contents listed
"""
