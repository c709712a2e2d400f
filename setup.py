"""Packaging: everything is read from settings.ini, the one place where the project is described."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
lib = cfg["lib_path"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("reproduce", "cluster", "metrics", "dev")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], license="Apache-2.0",
    long_description=Path("README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
    packages=find_packages(include=[lib, f"{lib}.*"]), include_package_data=False,
    package_data={"": ["**/*.cu", "**/*.cuh", "**/*.cpp"]},
    python_requires=f">={cfg['min_python']}", install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": f"{lib}={lib}._modidx:d"},
)
