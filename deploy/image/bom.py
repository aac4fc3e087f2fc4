"""Writes the bill of materials of an image, in CycloneDX, to `/opt/mercato/bom.json` in the first of its layers.

    /bom/bin/python deploy/image/bom.py mercato /image
    /bom/bin/python deploy/image/bom.py mercato /migrating /image

It lists the packages of Python and of Debian that the layers have, each with its version and package URL.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from email.parser import HeaderParser
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

VERSION: Final = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def python_packages(layers: Sequence[Path]) -> Iterator[Component]:
    """The installed distributions, by name."""
    found: dict[str, Distribution] = {}
    for folder in (each for layer in layers for each in (layer / "opt/mercato/lib").glob("python*/site-packages")):
        found |= {each.metadata["Name"]: each for each in distributions(path=[str(folder)])}
    for name in sorted(found, key=str.lower):
        purl = PackageURL("pypi", name=re.sub(r"[-_.]+", "-", name).lower(), version=found[name].version)
        yield _component(name, found[name].version, purl)


def debian_packages(layers: Sequence[Path]) -> Iterator[Component]:
    """The packages of Debian that own files of the layers: those that root.py has copied, or all installed ones."""
    listed = [file.read_text() for layer in layers for file in sorted((layer / "var/lib/dpkg").glob("status.d/*"))]
    if not listed:
        listed = (layers[0] / "var/lib/dpkg/status").read_text().strip().split("\n\n")
    for entry in listed:
        fields = HeaderParser().parsestr(entry)
        purl = PackageURL("deb", "debian", fields["Package"], fields["Version"], {"arch": fields["Architecture"]})
        yield _component(fields["Package"], fields["Version"], purl)


def _component(name: str, version: str, purl: PackageURL) -> Component:
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl))


def main() -> None:
    package, *layers = map(Path, sys.argv[1:])
    found = VERSION.search((package / "__init__.py").read_text())
    assert found is not None
    bom = Bom()
    bom.metadata.component = Component(name="mercato", version=found[1], type=ComponentType.APPLICATION)
    parts = [*python_packages(layers), *debian_packages(layers)]
    bom.components.update(parts)
    bom.register_dependency(bom.metadata.component, parts)
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    outputter.output_to_file(str(layers[0] / "opt/mercato/bom.json"), allow_overwrite=True, indent=1)


if __name__ == "__main__":
    main()
