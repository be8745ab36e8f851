"""Where the op library of the kernels is: in a wheel, or in a safe cache."""

import os
import stat

import pytest
from support import builds
from support.builds import HEADER, calls, commands, said

from rigl_keras.kernels import library, packaged, toolchain


@pytest.fixture
def place(tmp_path, monkeypatch):
    return builds.place(tmp_path, monkeypatch)


@pytest.fixture
def wheel(place, monkeypatch):
    """Returns a package with libraries, as in a wheel; the cache is empty."""
    plan, package = toolchain.planned_build(), place / "package"
    libraries = {name: place / name for name in plan.libraries}
    for path in libraries.values():
        path.write_text("made")
    packaged.put(plan, libraries, package)
    monkeypatch.setattr(packaged, "_PACKAGE", package)
    # The files are not real libraries.
    monkeypatch.setattr(packaged, "_can_be_loaded", lambda path: True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent")
    return package


@pytest.fixture
def stub(place, monkeypatch):
    return builds.stub(place, monkeypatch)


def test_a_wheel_brings_libraries(wheel, place, monkeypatch):
    """Nothing is compiled."""
    built = library.build()
    assert built == library.path() and built.is_relative_to(wheel / "kernels")
    assert library.build_network() == wheel / "serving/rigl_keras_network.so"
    assert not (place / "cache").exists()
    # Other files go to the cache, which is writable.
    kept = library.cache_folder()
    assert kept.parent == place / "cache" and kept.is_dir()
    # A sanitizer needs other libraries.
    monkeypatch.setenv("RIGL_KERAS_KERNELS", "thread")
    with pytest.raises(toolchain.BuildError, match="CXX"):
        library.build()


def test_a_wheel_for_another_tensorflow(wheel, monkeypatch):
    monkeypatch.setattr(library.tf, "__version__", "99.0")
    with pytest.raises(toolchain.BuildError, match="CXX"):
        library.build()
    # The network library does not depend on TensorFlow.
    assert library.build_network() == wheel / "serving/rigl_keras_network.so"


@pytest.mark.parametrize("what", ["sources", "system", "force", "load"])
def test_what_a_wheel_brings_and_is_not_taken(
    wheel, place, stub, monkeypatch, what
):
    stub()
    if what == "sources":
        (place / "sources" / "lanes.h").write_text("// other")
    elif what == "system":  # an older system than the wheel's
        monkeypatch.setattr(packaged, "_can_be_loaded", lambda path: False)
    elif what == "force":
        library.build(force=True)
    else:  # another build of the same version of TensorFlow
        loads = []

        def loaded(built):
            loads.append(built)
            if built.is_relative_to(wheel):
                raise library.BuildError("undefined symbol")
            return library

        monkeypatch.setattr(library, "_loaded", loaded)
        assert library.load() is library and len(loads) == 2
    assert library.build().is_relative_to(place / "cache")
    assert library.build_network().is_relative_to(place / "cache")


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "no_library.so").write_text("")
    assert not packaged._can_be_loaded(tmp_path / "no_library.so")


def test_a_cache_that_cannot_be_written(place, stub, monkeypatch):
    (place / "file").write_text("")
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(place / "file" / "cache"))
    own = place / "tmp" / f"rigl_keras-{os.getuid()}"
    would_be = library.path()
    assert would_be.parents[1] == own and not own.exists()
    assert library.build() == would_be == library.path()
    about = own.stat()
    assert stat.S_IMODE(about.st_mode) == 0o700
    assert len(calls(place)) == commands()


@pytest.mark.parametrize("how", ["open", "another's", "link"])
def test_a_folder_in_tmp_of_somebody_else(place, stub, monkeypatch, how):
    (place / "file").write_text("")
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(place / "file"))
    built = library.build()
    own = built.parents[1]
    if how == "open":
        own.chmod(0o777)
    elif how == "another's":
        uid = os.getuid()
        monkeypatch.setattr(
            library, "_places", lambda: [(place / "file", False), (own, True)]
        )
        monkeypatch.setattr(library.os, "getuid", lambda: uid + 1)
    else:
        own.rename(place / "elsewhere")
        own.symlink_to(place / "elsewhere")
    # The library exists, but is not loaded and not written.
    with pytest.raises(toolchain.BuildError) as error:
        library.build()
    assert "not only yours" in str(error.value)
    assert str(place / "file") in str(error.value)
    assert "RIGL_KERAS_CACHE" in str(error.value)
    assert len(calls(place)) == commands()


def test_where_the_cache_is(place, stub, monkeypatch):
    assert library.path().parents[1] == place / "cache"
    monkeypatch.delenv("RIGL_KERAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "xdg"))
    assert library.path().parents[1] == place / "xdg" / "rigl_keras"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(place))
    assert library.path().parents[1] == place / ".cache" / "rigl_keras"
    monkeypatch.setenv("RIGL_KERAS_CACHE", "~/mine")
    assert library.path().parents[1] == place / "mine"


def test_another_version_has_another_folder(place, stub, monkeypatch):
    paths = [library.build()]
    (place / "sources" / "lanes.h").write_text(HEADER + "\n")
    paths.append(library.build())
    stub(version=2)  # the compiler's version does not count
    assert library.build() == paths[-1]
    for sanitizer in ("address", "thread"):
        monkeypatch.setenv("RIGL_KERAS_KERNELS", sanitizer)
        paths.append(library.build())
        assert f"-fsanitize={sanitizer}" in calls(place)[-1]
    monkeypatch.delenv("RIGL_KERAS_KERNELS")
    monkeypatch.setattr(library.tf, "__version__", "99.0")
    paths.append(library.build())
    assert paths[-1].parent.name.startswith("99.0-")
    assert len({path.parent for path in paths}) == 5
    assert all(path.read_text() == "made" for path in paths)
    assert len(calls(place)) == 5 * commands()


@pytest.fixture
def nobody():
    """Returns a function that gives files to another user; needs root."""
    if os.getuid():
        pytest.skip("files can be given away by root alone")
    return lambda *paths: [os.chown(path, 65534, 65534) for path in paths]


def folders(place):
    """Returns the cache of a place, the built library and the plan."""
    built = library.build()
    return place / "cache", built.parent, built


@pytest.mark.parametrize("at", [0, 1, 2], ids=["cache", "folder", "file"])
def test_another_user_owns_it(place, stub, nobody, at):
    """A library, or a folder above it, belongs to another user."""
    parts = folders(place)
    parts[0].chmod(0o1777)
    assert library.build() == parts[2]  # nobody else can replace it
    nobody(parts[at])
    found = library.build()
    if at < 2:  # The folder is not read.
        own = place / "tmp" / f"rigl_keras-{os.getuid()}"
        assert found.parents[1] == own and stat.S_IMODE(own.stat().st_mode) == (
            0o700
        )
    else:  # The folder is ours, so the library is built there again.
        assert found == parts[2] and found.stat().st_uid == os.getuid()


@pytest.mark.parametrize("bits", [0o002, 0o020], ids=["all", "a group"])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["cache", "folder", "file"])
def test_others_can_write_it(place, stub, monkeypatch, caplog, at, bits):
    parts = folders(place)
    # As with a group that has several members.
    monkeypatch.setattr(library, "_of_this_user", lambda path, gid: False)
    parts[at].chmod(0o755 | bits)
    parts[2].write_text("planted")
    found = library.build()
    assert found.read_text() == "made"
    assert (found == parts[2]) == (at == 2)
    assert stat.S_IMODE(found.stat().st_mode) & 0o022 == 0
    told = [line for line in said(caplog) if "is not used" in line]
    assert len(told) == (at < 2)
    for line in told:
        who = "everybody" if bits == 0o002 else "the group"
        assert str(parts[0]) in line and f"{who} " in line


def test_a_folder_far_above_is_open(place, stub, monkeypatch):
    deep = place / "open" / "closed" / "cache"
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(deep))
    assert library.build().is_relative_to(deep)
    (place / "open").chmod(0o777)
    assert not library.build().is_relative_to(place / "open")
    (place / "open").chmod(0o1777)  # as /tmp is
    assert library.build().is_relative_to(deep)


def test_a_link_is_judged_by_where_it_leads(place, stub, monkeypatch):
    (place / "open").mkdir()
    (place / "link").symlink_to(place / "open")
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(place / "link"))
    assert library.build().parents[1] == place / "open"
    (place / "open").chmod(0o777)
    assert library.build().parents[2] == place / "tmp"


def test_a_group_of_this_user_alone(place, stub, monkeypatch):
    """Files with a umask of 002 in a home folder are used, as by OpenSSH."""
    import grp
    import pwd
    import types

    cache, folder, built = folders(place)
    for path in (cache, folder, built):
        path.chmod(0o775)
    user = pwd.getpwuid(os.getuid())
    members = []
    monkeypatch.setattr(
        grp,
        "getgrgid",
        lambda gid: types.SimpleNamespace(
            gr_name=user.pw_name, gr_mem=members, gr_gid=gid
        ),
    )
    gid = cache.stat().st_gid
    alone = types.SimpleNamespace(
        pw_name=user.pw_name, pw_gid=gid, pw_dir=user.pw_dir
    )
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: alone)
    assert library.build() == built
    members.append("another")
    assert library.build() != built


def test_a_umask_of_zero(place, stub, monkeypatch):
    monkeypatch.setenv("RIGL_KERAS_CACHE", str(place / "a" / "b"))
    before = os.umask(0)
    try:
        built = library.build()
    finally:
        os.umask(before)
    for path in (built, *built.parents[:3]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755, path
    assert library.build() == built


def test_no_place_is_safe(place, stub, caplog):
    (place / "cache").mkdir()
    (place / "cache").chmod(0o777)
    own = place / "tmp" / f"rigl_keras-{os.getuid()}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    assert library.load() is None and library.load() is None
    assert "it is not only yours: everybody can" in library.unavailable()
    assert calls(place) == []
    assert len([line for line in said(caplog) if "densely" in line]) == 1


def test_a_relative_cache(place, stub, monkeypatch):
    """It is relative to the first working folder of the process."""
    for folder in ("first", "later"):
        (place / folder).mkdir()
    monkeypatch.chdir(place / "first")
    monkeypatch.setenv("RIGL_KERAS_CACHE", "a relative cache")
    built = library.build()
    assert built.is_relative_to(place / "first" / "a relative cache")
    monkeypatch.chdir(place / "later")
    assert library.path() == library.build() == built
    assert list((place / "later").iterdir()) == []
