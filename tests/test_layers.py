"""The floors of the house: imports point strictly down (DESIGN.md, "Rooms and floors")

A module may import modules of lower floors alone, so a new one needs a line in FLOORS. Rooms (20 to 89) share the floor 6: none imports another.
"""
import ast
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
FLOORS = dict(geometry=0, bev_pool_gpu=.9, viz=1, bev_pool=1, toy=1, tables=1, ema=1.9, enhance=1.9, data=2, fit=2, augment=2, candidates=2.5, scene_files=2.55,
              scene_sim=2.6, hypotheses=2.65, association=2.7, recheck=2.72, cosypose=2.75, refine_gtsam=2.79, refinement=2.8, scene_scores=2.85, scene_show=2.9,
              rig=2.95, lss=3, crops=3, rasters=3.5,
              losses=3.9, dataset=4, metric=4, ranking=4.5, rerank=4.7, evaluate=5, baselines=5.2, measure=5.2, validate=5.4, train=5.5, joint=5.6, export=5.8,
              occ_kernels=5.9, modal_learning=5.9, occ_boxes=5.905, occ_scene=5.91, occ_files=5.92, occ_score=5.93, occ_shapes=5.935, occ_crops=5.936,
              occ_complete=5.936, occ_former=5.94, occ_model=5.95,
              occ_show=5.97, conditions=6, cross_modal=6, sequences=6, alignment=6, occupancy=6, routes=6.1, sequence_learning=6.2, report=6.5, explore=6.5, demo=6.8,
              cli=7, cli_scene=7.1, cli_sequences=7.1, cli_occupancy=7.1)
ROOMS = {'conditions', 'cross_modal', 'sequences', 'routes', 'sequence_learning', 'alignment', 'occupancy'}
ANNEX = dict(routes={'sequences'}, sequence_learning={'sequences', 'routes'}) # a room of several notebooks
ONLY = dict(geometry=set(), viz={'geometry'}, bev_pool_gpu=set(), bev_pool={'geometry', 'bev_pool_gpu', '_C'}, toy={'geometry'}, tables=set(), data={'geometry', 'tables'}, fit={'ema'}) # narrower than their floor
# What a declared requirement brings under another name, and what comes with it
BRINGS = {'nuscenes-devkit': {'nuscenes', 'cv2', 'PIL', 'pyquaternion'}, 'efficientnet-pytorch': {'efficientnet_pytorch'}}

modules = {p.stem: ast.parse(p.read_text(encoding='utf-8')) for p in sorted((root/'bev_reid').glob('*.py')) if not p.stem.startswith('_')}

def own(node):
    "Modules of the package that an import names"
    if isinstance(node, ast.Import): names = [a.name for a in node.names]
    elif node.level: names = [f'bev_reid.{node.module}'] if node.module else [f'bev_reid.{a.name}' for a in node.names]
    else: names = [f'bev_reid.{a.name}' for a in node.names] if node.module == 'bev_reid' else [node.module]
    return {n.split('.')[1] for n in names if n.startswith('bev_reid.')}

def imports(tree): return [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]

def always(body):
    "Imports that run when the module is imported"
    for n in body:
        if isinstance(n, (ast.Import, ast.ImportFrom)): yield n
        elif not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            # `try: import x / except ImportError` is a guarded, optional import
            for part in ('body', 'orelse', 'finalbody') if not isinstance(n, ast.Try) else ('orelse', 'finalbody'): yield from always(getattr(n, part, []) if isinstance(getattr(n, part, []), list) else [])

def declared():
    cfg = ConfigParser(delimiters=['=']); cfg.read(root/'settings.ini')
    out = set()
    for r in cfg['DEFAULT']['requirements'].split():
        name = r.split('<')[0].split('>')[0].split('=')[0].split('[')[0].lower()
        out |= BRINGS.get(name, {name.replace('-', '_')})
    return out


@pytest.mark.parametrize('name', modules)
def test_every_module_has_a_floor(name): assert name in FLOORS, f'bev_reid.{name} has no floor: add it to FLOORS, and to the table of the design'

@pytest.mark.parametrize('name', [m for m in modules if m in FLOORS])
def test_imports_point_down(name):
    for node in imports(modules[name]):
        for dep in own(node):
            where = f'bev_reid/{name}.py:{node.lineno} imports {dep}'
            if dep.startswith('_'): continue # the compiled extension, the version
            assert dep in FLOORS, where
            assert FLOORS[dep] < FLOORS[name], f'{where}: floor {FLOORS[dep]} is not below {FLOORS[name]}'
            assert dep in ONLY.get(name, {dep}), f'{where}: it may import only {sorted(ONLY[name]) or "nothing"} of this package'

def test_nothing_imports_a_room_but_the_cli():
    for name, tree in modules.items():
        for node in imports(tree) if not name.startswith('cli') else []: assert not own(node) & ((ROOMS | {'cli'})-ANNEX.get(name, set())), f'bev_reid/{name}.py:{node.lineno}'

@pytest.mark.parametrize('name', modules)
def test_what_is_not_required_is_imported_when_needed(name):
    allowed = declared() | {'bev_reid'} | set(sys.stdlib_module_names)
    for node in always(modules[name].body):
        tops = {a.name.split('.')[0] for a in node.names} if isinstance(node, ast.Import) else set() if node.level else {node.module.split('.')[0]}
        assert tops <= allowed, f'bev_reid/{name}.py:{node.lineno}: {sorted(tops-allowed)} is no requirement: import it inside the function that needs it'

def test_importing_the_package_writes_nothing():
    "No directory is made, no file is opened and no table is read on import"
    for name, tree in modules.items():
        for node in tree.body:
            for call in [n for n in ast.walk(node) if isinstance(n, ast.Call)] if isinstance(node, (ast.Expr, ast.Assign)) else []:
                assert getattr(call.func, 'attr', getattr(call.func, 'id', '')) not in {'mkdir', 'makedirs', 'open', 'write_text', 'urlretrieve', 'set_num_threads'}, f'bev_reid/{name}.py:{call.lineno}'

def test_rule_finder():
    "The rules see what they should"
    tree = ast.parse('from .lss import a\nfrom bev_reid import crops\nimport bev_reid.data as d\nfrom . import fit\ndef f():\n import trimesh\ntry: import embreex\nexcept ImportError: embreex = None\nif True:\n import yaml')
    assert set().union(*map(own, imports(tree))) == {'lss', 'crops', 'data', 'fit'}
    assert 'yaml' in {a.name for n in always(tree.body) for a in n.names} and not {'trimesh', 'embreex'} & {a.name for n in always(tree.body) for a in n.names}
    assert {'torch', 'numpy', 'nuscenes', 'efficientnet_pytorch', 'tqdm'} <= declared()
