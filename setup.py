"""Everything is in pyproject.toml; this only puts ``recipes/`` into the wheel as ``lightning_spectral/recipes/``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """``build_py`` that also copies the top-level recipes, their one source."""

    def run(self) -> None:
        """Build, then copy; an editable install reads the top-level folder itself."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib) / "lightning_spectral" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
