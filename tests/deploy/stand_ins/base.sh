#!/bin/sh
# Makes the image `python-stand-in` for machines that reach a mirror of Debian and no registry of images: Debian's own
# Python, and the certificates of this machine. Needs root and debootstrap; takes two minutes. Then:
#
#     MERCATO_TEST_PYTHON_IMAGE=python-stand-in make test-deploy
set -eu
folder=$(mktemp --directory)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$folder" > "$folder.log" ||
    { tail -5 "$folder.log"; exit 1; }
rm -f "$folder.log"
cp /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs/"
tar --directory "$folder" --create . | docker import - python-stand-in
