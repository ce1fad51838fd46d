"""The flags know names that are defined in modules too slow to import for --help; and --help imports none of them."""
import subprocess
import sys
from pathlib import Path

from diffusion.samplers import SAMPLERS
from pipeline.moderation import CONCEPTS
from sampling import flags, request

ROOT = Path(__file__).parents[1]


def test_names_are_those_of_the_modules_that_define_them():
    assert flags.SAMPLERS == tuple(SAMPLERS)
    assert flags.SETTINGS == tuple(request.SETTINGS)
    assert sorted(flags.AXES) == sorted(request.AXES)
    assert flags.CONCEPTS == CONCEPTS


def test_help_imports_no_torch():
    code = ("import runpy, sys\nsys.argv = ['sample.py', '--help']\n"
            "try:\n    runpy.run_path('sample.py', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code\n"
            "print('imported', [name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--speed" in done.stdout and done.stdout.splitlines()[-1] == "imported []"
