"Fixtures that several test files share"
import pytest
from filelock import FileLock


@pytest.fixture(scope='session')
def toy_root(tmp_path_factory):
    "A small toy world: 2 scenes (one train, one test), 4 keyframes each; made once, also under xdist"
    from bev_reid.toy import make_toy
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith('popen-') else base
    with FileLock(str(base/'toy.lock')): return make_toy(base/'toy', n_scenes=2, n_samples=4, img_size=(112, 200), workers=2)
