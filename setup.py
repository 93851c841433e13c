"Builds bev_reid and its compiled extension; all metadata stands in settings.ini"
import sys
from configparser import ConfigParser
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def words(key): return cfg.get(key, '').split()

extras = {k: words(f'{k}_requirements') for k in ('toy', 'train', 'export', 'gtsam', 'docs', 'dev')}
extras['all'] = sorted({r for k in ('toy', 'train', 'export') for r in extras[k]})
# macOS's compiler has no OpenMP of its own: one thread there
openmp = [] if sys.platform == 'darwin' else (['/openmp'] if sys.platform == 'win32' else ['-fopenmp'])
flags = ['/O2'] if sys.platform == 'win32' else ['-O3', '-fvisibility=hidden']
ext = Pybind11Extension('bev_reid._C', sorted(glob('csrc/*.cpp')), cxx_std=17, include_dirs=['csrc'], depends=sorted(glob('csrc/*.h')),
                        extra_compile_args=flags + openmp, extra_link_args=openmp if sys.platform != 'win32' else [])

if __name__ == '__main__':
    with ParallelCompile():
        setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
              keywords=cfg['keywords'], author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
              long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
              long_description_content_type='text/markdown', packages=find_packages(include=['bev_reid', 'bev_reid.*']),
              python_requires=f">={cfg['min_python']},<3.13", install_requires=words('requirements'), extras_require=extras,
              entry_points={'console_scripts': cfg.get('console_scripts', '').split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
              ext_modules=[ext], cmdclass={'build_ext': build_ext}, zip_safe=False)
