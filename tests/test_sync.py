"Notebooks, package and README say the same, and the notebooks are clean and small. Nothing here touches the tree itself."
import filecmp
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

def run(*args, cwd=root, **env):
    r = subprocess.run([sys.executable, '-B', *map(str, args)], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})
    return r.returncode, (r.stdout+r.stderr)[-4000:]

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The sources in a temporary place, where commands may write"
    dst = tmp_path_factory.mktemp('tree')
    skip = shutil.ignore_patterns('__pycache__', '*.so', '*.part', '.ipynb_checkpoints', 'mathjax')
    for name in ('nbs', 'bev_reid'): shutil.copytree(root/name, dst/name, ignore=skip)
    for name in ('settings.ini', 'README.md', 'pyproject.toml', 'setup.py'):
        if (root/name).exists(): shutil.copy(root/name, dst/name)
    return dst

def test_export_changes_nothing(copy):
    pytest.importorskip('nbdev')
    rc, out = run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy, PYTHONPATH=str(copy))
    assert rc == 0, out
    names = {p.relative_to(copy) for p in (copy/'bev_reid').rglob('*.py')} | {p.relative_to(root) for p in (root/'bev_reid').rglob('*.py')}
    differ = [str(n) for n in sorted(names) if not ((copy/n).exists() and (root/n).exists() and filecmp.cmp(copy/n, root/n, shallow=False))]
    assert not differ, f'nbdev_export changes {differ}: edit the notebook and run nbdev_export (or nbdev_update after an edit of the module)'

def test_clean_changes_nothing(copy):
    pytest.importorskip('nbdev')
    rc, out = run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy, HOME=str(copy))
    assert rc == 0, out
    differ = [str(p.relative_to(copy)) for p in (copy/'nbs').rglob('*.ipynb') if p.read_bytes() != (root/p.relative_to(copy)).read_bytes()]
    assert not differ, f'nbdev_clean changes {differ}'

def test_notebooks_are_sound():
    rc, out = run('nbs/_tools/outputs.py', '--check')
    assert rc == 0, out

def test_readme_says_what_the_index_says():
    rc, out = run('nbs/_tools/readme.py', '--check')
    assert rc == 0, out

def test_every_notebook_ends_with_its_export():
    for p in (root/'nbs').glob('*.ipynb'):
        cells = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        if any('#| default_exp' in c for c in cells): assert 'nbdev_export()' in cells[-1] and '#| hide' in cells[-1], p.name

def test_versions_agree():
    from configparser import ConfigParser
    cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    assert f'__version__ = "{cfg["DEFAULT"]["version"]}"' in (root/'bev_reid'/'__init__.py').read_text()
    assert f'## [{cfg["DEFAULT"]["version"]}]' in (root/'CHANGELOG.md').read_text()


# The checks themselves

@pytest.fixture
def tools(): return runpy.run_path(str(root/'nbs'/'_tools'/'outputs.py'))

def notebook(tmp_path, *outputs, **cell):
    nb = dict(cells=[dict(cell_type='code', execution_count=None, id='a1', metadata={}, outputs=list(outputs), source=['1']) | cell], metadata={}, nbformat=4, nbformat_minor=5)
    path = tmp_path/'x.ipynb'
    path.write_text(json.dumps(nb, sort_keys=True, indent=1)+'\n')
    return path

def text(t): return dict(output_type='stream', name='stdout', text=[t])

@pytest.mark.parametrize('outputs, word', [([], None), ([text('fine: 3/4 of 12 it')], None), ([text('/home/me/data')], 'path'), ([text('10.2it/s')], 'timing'), ([text('x'*200_000)], '150 kB'),
    ([dict(output_type='stream', name='stderr', text=['w'])], 'stderr'), ([dict(output_type='error', ename='E', evalue='', traceback=[])], 'error'),
    ([dict(output_type='display_data', metadata={}, data={'application/vnd.jupyter.widget-view+json': {}})], 'widget')])
def test_checks_see_what_they_should(tools, tmp_path, outputs, word):
    bad = tools['check'](notebook(tmp_path, *outputs))
    assert bad == [] if word is None else word in ' '.join(bad)

def test_checks_see_unclean_notebooks(tools, tmp_path):
    assert 'clean' in ' '.join(tools['check'](notebook(tmp_path, execution_count=3)))
    assert 'kB' in ' '.join(tools['check'](notebook(tmp_path, source=['#'*500_000])))
