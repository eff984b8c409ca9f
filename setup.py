"""Package map: every top-level folder imports as longtake.<folder>; all other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ["scripts", "evaluation", "pipelines", "models", "attention", "samplers", "cache", "rope", "configs"]
found = find_packages(include=[pattern for name in FOLDERS for pattern in (name, f"{name}.*")])

setup(
    packages=["longtake", *(f"longtake.{name}" for name in found)],
    package_dir={f"longtake.{name}": name for name in FOLDERS},
    package_data={
        "longtake": ["py.typed"],
        "longtake.configs": ["**/*.yaml"],
        "longtake.models": ["**/*.safetensors", "**/*.json"],
        "longtake.evaluation": ["**/*.safetensors", "**/*.json", "**/*.yaml", "**/*.js", "**/*.css", "**/*.j2"],
    },
)
