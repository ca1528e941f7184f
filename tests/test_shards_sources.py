"""The builder's sources: each gives what the folder of the same images gives; bad ones are named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from building import contents, digests, encoded, plain_files, run, write_tree
from scipy import io as scipy_io

import shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "source", plain_files())


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="nowhere: no such file or folder; wanted a folder of class folders"
    ):
        run(tmp_path / "nowhere", tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"wanted one folder per class \(<class>/<image>\), found nothing"):
        run(empty, tmp_path / "out")
    (empty / "a.jpg").write_bytes(encoded())
    with pytest.raises(ValueError, match="found 1 files and no folders"):
        run(empty, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"a\.jpg: a file of no known kind; wanted a folder of class folders"
    ):
        run(empty / "a.jpg", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_images_is_named(source: Path, tmp_path: Path) -> None:
    (source / "c9").mkdir()
    (source / "c9" / "notes.txt").write_text("soon")
    with pytest.raises(ValueError, match="c9: a class folder without images"):
        run(source, tmp_path / "out")


def test_output_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(ValueError, match="where it would be a class"):
        run(source, source / "out")


@pytest.mark.parametrize("place", ["c1", "c1/more"])
def test_a_broken_link_that_may_have_been_a_folder_is_named(source: Path, tmp_path: Path, place: str) -> None:
    link = source / place
    if place == "c1":
        link.rename(tmp_path / "moved")
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=rf"{link}: a link to '.*nowhere', which is not there; .* mend the link"
    ):
        run(source, tmp_path / "out")


def test_class_tars_beside_class_folders_are_refused(source: Path, tmp_path: Path) -> None:
    packed({"c7_1.jpg": encoded()}, source / "c7.tar")
    with pytest.raises(ValueError, match=r"source: holds tars of images \(c7\.tar\) and folders \(c0\)"):
        run(source, tmp_path / "out")


def test_links_in_a_circle_are_refused(source: Path, tmp_path: Path) -> None:
    (source / "c0" / "again").symlink_to(source / "c0")
    with pytest.raises(ValueError, match="leads back into a folder above"):
        run(source, tmp_path / "out")


# Archives, lists and sets give what the folder gives.


def packed(files: dict[str, bytes], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def class_tars(root: Path, folder: Path) -> list[Path]:
    """`<class>.tar` for each class folder, members in some other order."""
    found = []
    for path in sorted(root.iterdir()):
        names = sorted((p.name for p in path.iterdir()), key=lambda name: name[::-1])
        found.append(packed({f"./{n}": (path / n).read_bytes() for n in names}, folder / f"{path.name}.tar"))
    return found


def train_tar(root: Path, path: Path) -> Path:
    inner = class_tars(root, path.parent / "inner")
    return packed({tar.name: tar.read_bytes() for tar in reversed(inner)}, path)


def flat_tar(root: Path, path: Path) -> dict[str, str]:
    """All images in one tar, as the validation images are; returns the class of each."""
    images = sorted(root.glob("*/*"), key=lambda image: image.name)
    packed({image.name: image.read_bytes() for image in images}, path)
    return {image.name: image.parent.name for image in images}


def devkit(path: Path, classes: dict[str, str]) -> Path:
    """A devkit whose ids are not in the order of the class names, as the real one's."""
    names = sorted(set(classes.values()))
    ids = {name: 10 + (7 * i) % len(names) for i, name in enumerate(names)}
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", object), ("words", object), ("num_children", "f8")]
    rows = [(ids[name], name, f"{name}, in words", 0) for name in names] + [(999, "n99", "a group", 2)]
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(rows, dtype=kinds)})
    truth = "".join(f"{ids[classes[image]]}\n" for image in sorted(classes))
    files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    plain = packed({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()}, path)
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.fixture
def val(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """A folder of validation images named as ILSVRC2012's, the flat tar of them, and their classes."""
    labels = enumerate([2, 0, 1, 1, 2, 0, 1], 1)
    files = {f"n0{c}/ILSVRC2012_val_{i:08d}.JPEG": encoded(seed=i) for i, c in labels}
    root = write_tree(tmp_path / "val", files)
    return root, tmp_path / "a" / "val.tar", flat_tar(root, tmp_path / "a" / "val.tar")


def same_build(one: Path, other: Path, tmp_path: Path, **options: Any) -> None:
    """Both sources give the same files, bit for bit, the second one with 4 workers too and after a dry run."""
    run(one, tmp_path / "one", samples_per_shard=2)
    dry = run(other, tmp_path / "dry", samples_per_shard=2, dry_run=True, **options)
    assert not (tmp_path / "dry").exists()
    for workers in (1, 4):
        out = tmp_path / f"other{workers}"
        built = run(other, out, samples_per_shard=2, workers=workers, **options)
        assert (built.samples, built.shards, built.image_bytes) == (dry.samples, dry.shards, dry.image_bytes)
        assert digests(out) == digests(tmp_path / "one")


def test_the_train_archive_gives_what_its_folder_gives(source: Path, tmp_path: Path) -> None:
    same_build(source, train_tar(source, tmp_path / "a" / "train.tar"), tmp_path)


def test_a_folder_of_class_tars_gives_what_its_folder_gives(source: Path, tmp_path: Path) -> None:
    class_tars(source, tmp_path / "tars")
    same_build(source, tmp_path / "tars", tmp_path)


@pytest.mark.parametrize("form", ["devkit", "devkit folder", "LOC_val_solution", "pairs", "column"])
def test_the_validation_archive_gives_what_its_folder_gives(
    val: tuple[Path, Path, dict[str, str]], tmp_path: Path, form: str
) -> None:
    root, tar, classes = val
    labels = tmp_path / "labels"
    if form == "devkit":
        devkit(labels, classes)
    elif form == "devkit folder":
        with tarfile.open(devkit(tmp_path / "devkit", classes)) as kit:
            kit.extractall(labels, filter="data")
        labels = labels / "ILSVRC2012_devkit_t12"
    elif form == "LOC_val_solution":
        rows = [f"{Path(i).stem},{c} 1 2 3 4 {c} 5 6 7 8 \n" for i, c in classes.items()]
        labels.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    elif form == "pairs":
        labels.write_text("".join(f"{i} {c}\n" for i, c in reversed(classes.items())))
    else:
        labels.write_text("".join(f"{classes[i]}\n" for i in sorted(classes)))
    same_build(root, tar, tmp_path, labels=labels)


def test_numbers_for_validation_images_index_the_class_file(
    val: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    _, tar, classes = val
    names = tmp_path / "names"
    names.write_text("n00000002 a cat, a feline\nn00000001 a dog\nn00000000 a bird\n")
    labels = tmp_path / "labels"
    number = {"n02": 0, "n01": 1, "n00": 2}
    labels.write_text("".join(f"{i} {number[c]}\n" for i, c in classes.items()))
    run(tar, tmp_path / "out", labels=labels, classes=names)
    store = shards.open(tmp_path / "out")
    assert store.classes == ["n00000002", "n00000001", "n00000000"]
    found = {store.key(i): int(store.label[i]) for i in range(len(store))}
    assert found == {Path(i).stem: number[c] for i, c in classes.items()}
    run(tar, tmp_path / "plain", labels=labels)
    assert shards.open(tmp_path / "plain").classes == ["0", "1", "2"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["class", "label"])
def test_a_list_gives_what_the_folder_gives(source: Path, tmp_path: Path, form: str, column: str) -> None:
    rows = [(f"source/{p.parent.name}/{p.name}", p.parent.name) for p in sorted(source.glob("*/*"))]
    rows[3] = (str(tmp_path / rows[3][0]), rows[3][1])
    path = tmp_path / f"list.{form}"
    if form == "csv":
        lines = [f"split,path,{column}", *(f"a,{file},{name}" for file, name in rows)]
        path.write_text("\n".join(lines), "utf-8-sig")
    else:
        path.write_text("".join(json.dumps({"path": f, column: n}) + "\n\n" for f, n in rows))
    run(source, tmp_path / "folder")
    run(path, tmp_path / "dry", dry_run=True)
    assert not (tmp_path / "dry").exists()
    for workers in (1, 4):
        run(path, tmp_path / f"list{workers}", workers=workers)
        assert contents(shards.open(tmp_path / f"list{workers}")) == contents(
            shards.open(tmp_path / "folder")
        )
    ours, folders = digests(tmp_path / "list1"), digests(tmp_path / "folder")
    assert ours == digests(tmp_path / "list4")
    assert [n for n in ours if ours[n] != folders[n]] == ["manifest.json"], (
        "only the names of the source differ"
    )


def test_a_list_keeps_its_order_and_its_numbers(source: Path, tmp_path: Path) -> None:
    files = sorted(source.glob("*/*"))[::-1]
    path = tmp_path / "list.csv"
    path.write_text("label,path\n" + "".join(f"{i % 5},{p}\n" for i, p in enumerate(files)))
    run(path, tmp_path / "out")
    store = shards.open(tmp_path / "out")
    assert [store.read(i).tobytes() for i in range(12)] == [p.read_bytes() for p in files]
    assert store.label.tolist() == [i % 5 for i in range(12)]
    assert store.classes == ["0", "1", "2", "3", "4"]
    (tmp_path / "names").write_text("e\nd\nc\nb\na\n")
    run(path, tmp_path / "named", classes=tmp_path / "names")
    named = shards.open(tmp_path / "named")
    assert named.label.tolist() == store.label.tolist()
    assert named.classes == ["e", "d", "c", "b", "a"]


def test_a_set_of_ours_gives_the_same_tars_again(source: Path, tmp_path: Path) -> None:
    (source / "c0" / ("é" * 100 + ".jpg")).write_bytes(encoded(seed=5))
    (source / "c0" / "c0_1.png").write_bytes(encoded("PNG", seed=6))
    run(source, tmp_path / "one", seed=3)
    dry = run(tmp_path / "one", tmp_path / "dry", dry_run=True)
    assert (dry.samples, dry.classes) == (14, 3)
    for workers in (1, 4):
        run(tmp_path / "one", tmp_path / f"again{workers}", workers=workers)
    ours, again = digests(tmp_path / "one"), digests(tmp_path / "again1")
    assert again == digests(tmp_path / "again4")
    assert ours.keys() == again.keys()
    assert [name for name in ours if ours[name] != again[name]] == ["manifest.json", "oddities.csv"], (
        "only names of the source"
    )


def webdataset_tars(source: Path, folder: Path, name_of: Callable[[Path], object]) -> None:
    """A set as webdataset's own writer leaves it, with times in extended headers before each member."""
    folder.mkdir()
    pattern = str(folder / "theirs-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for path in sorted(source.glob("*/*")):
            sample = {
                "__key__": path.stem,
                "jpg": path.read_bytes(),
                "cls": str(name_of(path)),
                "json": b"{}",
            }
            writer.write(sample)


@pytest.mark.parametrize("form", ["folder", "pattern", "named"])
def test_webdataset_tars_of_others(source: Path, tmp_path: Path, form: str) -> None:
    theirs = tmp_path / "theirs"
    webdataset_tars(source, theirs, lambda p: p.parent.name if form == "named" else int(p.parent.name[1:]))
    given = theirs if form != "pattern" else theirs / "theirs-{000..002}.tar"
    names = tmp_path / "names"
    names.write_text("c0\nc1\nc2\n")
    run(source, tmp_path / "folder")
    dry = run(given, tmp_path / "dry", dry_run=True)
    assert (dry.samples, dry.shards) == (12, 4)
    for workers in (1, 4):
        run(given, tmp_path / f"out{workers}", workers=workers, classes=names)
    ours, folders = digests(tmp_path / "out1"), digests(tmp_path / "folder")
    assert ours == digests(tmp_path / "out4")
    assert [n for n in ours if ours[n] != folders[n]] == ["manifest.json"], (
        "only the names of the source differ"
    )
    run(given, tmp_path / "plain")
    plain = shards.open(tmp_path / "plain")
    assert plain.classes == (["c0", "c1", "c2"] if form == "named" else ["0", "1", "2"])
    names.write_text("c0\nc1\n")
    with pytest.raises(
        ValueError, match=r"theirs-001\.tar: .*c2_11\.jpg: its label 'c?2' is not one of the 2 classes"
    ):
        run(given, tmp_path / "short", classes=names)


def test_one_tar_of_others(source: Path, tmp_path: Path) -> None:
    webdataset_tars(source, tmp_path / "theirs", lambda p: p.parent.name)
    run(tmp_path / "theirs" / "theirs-001.tar", tmp_path / "out")
    assert list(contents(shards.open(tmp_path / "out"))) == ["c1_10", "c1_4", "c1_7", "c2_11", "c2_2"]


def test_damage_in_tars_of_others_is_named(source: Path, tmp_path: Path) -> None:
    (source / "c1" / "c1_1.JPEG").write_bytes(encoded()[:200])
    webdataset_tars(source, tmp_path / "theirs", lambda p: p.parent.name)
    with pytest.raises(ValueError, match=r"theirs-000\.tar.*c1_1.*truncated"):
        run(tmp_path / "theirs", tmp_path / "out")
    assert run(tmp_path / "theirs", tmp_path / "out", on_error="skip").counts["rejected"] == 1
    assert "c1_1" in (tmp_path / "out" / "rejected.csv").read_text()


def test_names_in_tars_of_others_stay_inside_the_output(source: Path, tmp_path: Path) -> None:
    files = {
        "../../up.jpg": encoded(),
        "../../up.cls": b"0",
        "/root/x.jpg": encoded(seed=1),
        "/root/x.cls": b"1",
    }
    before = sorted(tmp_path.rglob("*"))
    run(packed(files, tmp_path / "evil" / "a.tar"), tmp_path / "deep" / "er" / "out")
    store = shards.open(tmp_path / "deep" / "er" / "out")
    assert [store.key(i) for i in range(2)] == ["______up", "_root_x"]
    made = {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - set(before)}
    assert made == {"evil", "deep"}
    assert {p.name for p in (tmp_path / "deep" / "er").iterdir()} == {"out"}


def test_to_beton_and_back_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "tar", seed=2)
    dry = run(tmp_path / "tar", tmp_path / "dry", target="beton", samples_per_shard=None, dry_run=True)
    assert (dry.samples, dry.shards) == (12, 1)
    for workers in (1, 4):
        run(
            tmp_path / "tar",
            tmp_path / f"beton{workers}",
            target="beton",
            samples_per_shard=None,
            workers=workers,
        )
        run(tmp_path / "beton1", tmp_path / f"back{workers}", workers=workers)
    assert digests(tmp_path / "beton1") == digests(tmp_path / "beton4")
    assert digests(tmp_path / "back1") == digests(tmp_path / "back4")
    assert contents(shards.open(tmp_path / "beton1")) == contents(shards.open(tmp_path / "tar"))
    ours, again = digests(tmp_path / "tar"), digests(tmp_path / "back1")
    assert [n for n in ours if ours[n] != again[n]] == ["manifest.json"], "only source and seed differ"
    # A .beton alone has neither keys nor class names; --classes brings the names back.
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "beton1" / "set.beton").rename(bare / "a.beton")
    (tmp_path / "names").write_text("c0\nc1\nc2\n")
    for given in (bare, bare / "a.beton"):
        out = tmp_path / f"from {given.name}"
        run(given, out, classes=tmp_path / "names")
        assert list(contents(shards.open(out)).values()) == list(
            contents(shards.open(tmp_path / "tar")).values()
        )


def test_an_unfinished_set_is_no_source(source: Path, tmp_path: Path) -> None:
    (source / "c2" / "z.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="zero bytes"):
        run(source, tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="not a finished shard set"):
        run(tmp_path / "one", tmp_path / "out")


def test_a_class_file_gives_the_order_and_may_name_more(source: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("c2\n\nc9\nc0\nc1\n")
    run(source, tmp_path / "out", classes=names)
    store = shards.open(tmp_path / "out")
    assert store.classes == ["c2", "c9", "c0", "c1"]
    run(source, tmp_path / "sorted")
    assert contents(store) == contents(shards.open(tmp_path / "sorted"))
    with pytest.raises(ValueError, match="images or classes in --source are others"):
        run(source, tmp_path / "out")


def test_folders_named_with_digits_are_names_to_a_class_file(tmp_path: Path) -> None:
    files = {"0/a.jpg": encoded(seed=1), "1/b.jpg": encoded(seed=2)}
    source = write_tree(tmp_path / "source", files)
    names = tmp_path / "classes.txt"
    names.write_text("1\n0\n")
    run(source, tmp_path / "out", classes=names)
    assert contents(shards.open(tmp_path / "out")) == {
        "0_a": ("0", files["0/a.jpg"]), "1_b": ("1", files["1/b.jpg"])
    }  # fmt: skip
    listed = tmp_path / "list.csv"  # `label` numbers the classes, `class` names them
    for column, wanted in (("label", ["1", "0"]), ("class", ["0", "1"])):
        listed.write_text(f"path,{column}\nsource/0/a.jpg,0\nsource/1/b.jpg,1\n")
        run(listed, tmp_path / column, classes=names)
        store = shards.open(tmp_path / column)
        assert [store.classes[label] for label in store.label] == wanted


def test_label_files_keep_dots_in_names_and_pass_over_empty_rows(tmp_path: Path) -> None:
    files = {"v1.2.jpg": encoded(seed=1), "v1.3.jpg": encoded(seed=2), "v2.JPEG": encoded(seed=3)}
    tar = packed(files, tmp_path / "a" / "val.tar")
    labels = tmp_path / "labels"
    for text in (
        "v1.2.jpg dog\nv1.3.jpg,cat\n\nv2.JPEG dog\nv2.JPEG dog\n",
        "ImageId,PredictionString\nv1.2,dog 1 2 3 4\n\nv1.3,cat 1 2 3 4\n,\nv2,dog 5 6 7 8\n",
    ):
        labels.write_text(text)
        out = tmp_path / f"out{len(text)}"
        run(tar, out, labels=labels)
        found = {data: name for name, data in contents(shards.open(out)).values()}
        assert found == {files["v1.2.jpg"]: "dog", files["v1.3.jpg"]: "cat", files["v2.JPEG"]: "dog"}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_list_is_split_at_line_ends_alone(tmp_path: Path, form: str) -> None:
    name = "a\u2028b\x85c.jpg"
    write_tree(tmp_path, {name: encoded()})
    path = tmp_path / f"list.{form}"
    row = json.dumps({"path": name, "class": "x"}, ensure_ascii=False)
    path.write_text(f"path,class\n{name},x\n" if form == "csv" else f"{row}\n", "utf-8")
    assert run(path, tmp_path / "out").samples == 1


# Bad sources.


def test_a_label_outside_the_class_list_is_named(source: Path, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("c0\nc2\n")
    message = rf"{source}/c1/c1_1\.JPEG: its label 'c1' is not one of the 2 classes of {names}"
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", classes=names)
    tar = train_tar(source, tmp_path / "a" / "train.tar")
    with pytest.raises(ValueError, match=rf"{tar}: c1/c1_1\.JPEG: its label 'c1' is not one of the 2"):
        run(tar, tmp_path / "out", classes=names)
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\nsource/c0/c0_0.JPEG,0\nsource/c0/c0_3.JPEG,2\n")
    with pytest.raises(ValueError, match=r"c0/c0_3\.JPEG: its label '2' is not one of the 2 classes"):
        run(listed, tmp_path / "out", classes=names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no class names in it"),
        ("a\nb\na\n", "class 'a' stands there twice"),
        ("a\nb\x07\n", "cannot be printed"),
        (None, "no such file; it should be a list of class names"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_bad_class_files(source: Path, tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = FileNotFoundError if text is None else ValueError
    with pytest.raises(error, match=rf"classes\.txt: .*{message}"):
        run(source, tmp_path / "out", classes=path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no images in it"),
        ("a.csv", "path,label\n", "no images in it"),
        (
            "a.csv",
            "x.jpg,0\ny.jpg,1\n",
            "line 2: wanted `path` and one of `label` and `class`, found `x.jpg`, `0`",
        ),
        ("a.csv", "path,label\nx.jpg,\n", "line 2: wanted `path` and one of .*, found `path`"),
        ("a.csv", "path,label,class\nx.jpg,1,b\n", "line 2: .* found `path`, `label`, `class`"),
        ("a.csv", "path,label\nx.jpg,-1\n", "line 2: label -1 is negative"),
        ("a.csv", "path,label\nx.jpg,0\nx.jpg,99999999999\n", "line 3: label 99999999999 is absurd"),
        ("a.jsonl", "[1]\n", "line 1: wanted an object"),
        ("a.jsonl", '\n{"path": \n', "line 2: not JSON"),
        ("a.jsonl", '{"path": 1, "label": 2}\n', "line 1: path must be text"),
        ("a.jsonl", '{"path": "a", "label": 1.5}\n', "line 1: .* whole number"),
        (
            "a.jsonl",
            '{"path": "a", "label": 1}\n{"path": "b", "class": "c"}\n',
            "some lines have `label` and some",
        ),
        ("a.jsonl", '{"path": "a\\u0000", "label": 1}\n', "zero byte"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        run(tmp_path / name, tmp_path / "out")


def test_listed_files_that_are_not_there_are_named(source: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("path,class\nsource/c0/c0_0.JPEG,c0\nsource/c0/gone.JPEG,c0\n")
    with pytest.raises(ValueError, match=r"gone\.JPEG: cannot be read: No such file"):
        run(listed, tmp_path / "out")
    assert run(listed, tmp_path / "out", on_error="skip").counts["rejected"] == 1
    assert "source/c0/gone.JPEG,cannot be read" in (tmp_path / "out" / "rejected.csv").read_text()


def test_archives_that_are_damaged_or_lead_out_are_refused(source: Path, tmp_path: Path) -> None:
    data = train_tar(source, tmp_path / "a" / "train.tar").read_bytes()
    bad = tmp_path / "bad.tar"
    bad.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"bad\.tar: .*(claims|cut off)"):
        run(bad, tmp_path / "out")
    bad.write_bytes(data[:700] + b"\xff" + data[701:])  # in the first inner header
    with pytest.raises(ValueError, match=r"bad\.tar: c2\.tar: the header at byte 0 is damaged or none"):
        run(bad, tmp_path / "out")
    inner = packed({"../../c0_1.jpg": encoded()}, tmp_path / "inner.tar").read_bytes()
    packed({"c0.tar": inner}, bad)
    with pytest.raises(ValueError, match=r"c0\.tar: a member named '\.\./\.\./c0_1\.jpg', which leads out"):
        run(bad, tmp_path / "out")
    twice = packed({"c0_1.jpg": encoded()}, tmp_path / "inner.tar").read_bytes()
    packed({"c0.tar": twice, "x/c0.tar": twice}, bad)
    with pytest.raises(ValueError, match="class 'c0' stands there twice"):
        run(bad, tmp_path / "out")
    packed({"c0.tar": packed({"notes.txt": b"x"}, tmp_path / "inner.tar").read_bytes()}, bad)
    with pytest.raises(ValueError, match=r"c0\.tar: a class without images"):
        run(bad, tmp_path / "out")
    huge = tarfile.TarInfo("c0.tar")
    huge.size = 1 << 50
    bad.write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"bad\.tar: .* claims 1125899906842624 bytes, only 1024 are left"):
        run(bad, tmp_path / "out")
    bad.write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match="damaged or none"):
        run(bad, tmp_path / "out")
    gzipped = bad.rename(tmp_path / "train.tar.gz")
    with pytest.raises(ValueError, match="compressed, so it cannot be read in place: gunzip it"):
        run(gzipped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_label_files_that_do_not_fit_are_refused(
    val: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    root, tar, classes = val
    with pytest.raises(ValueError, match=r"val\.tar: a tar of images without labels; say where .* --labels"):
        run(tar, tmp_path / "out")
    with pytest.raises(ValueError, match=r"--labels .* goes with a tar of images alone"):
        run(root, tmp_path / "out", labels=tmp_path / "labels")
    labels = tmp_path / "labels"
    with pytest.raises(FileNotFoundError, match="labels: no such file; it should be ILSVRC2012_devkit"):
        run(tar, tmp_path / "out", labels=labels)
    for text, message in (
        ("", "wanted ILSVRC2012_devkit"),
        ("1\n" * 7, "numbers without image names, whose order is not known"),
        ("n00\n" * 6, "6 classes for the 7 images"),
        ("ILSVRC2012_val_00000001.JPEG n00\nx n00\n", "no class for ILSVRC2012_val_00000002.JPEG of"),
        ("a b\nc\n", "line 2: an image and its class are two fields, found 1; wanted ILSVRC2012_devkit"),
        ("a.jpg b\n\nc.jpg a tabby\n", "line 3: an image and its class are two fields, found 3"),
        ("d/1.jpg a\n1.png b\n", r"line 2: 1\.png has class b here and a in a line before"),
        ("ImageId,PredictionString\nx\n", "line 2: an image and its class are two fields, found 1"),
    ):
        labels.write_text(text)
        with pytest.raises(ValueError, match=rf"labels(: |, ).*{message}"):
            run(tar, tmp_path / "out", labels=labels)
    devkit(labels, {name: c for name, c in classes.items() if "07" not in name})
    with pytest.raises(
        ValueError, match=r"no class for ILSVRC2012_val_00000007\.JPEG; .* a number in 1\.\.6"
    ):
        run(tar, tmp_path / "out", labels=labels)
    whole = labels.read_bytes()
    labels.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a readable \.tar\.gz"):
        run(tar, tmp_path / "out", labels=labels)
    truth = "k/data/ILSVRC2012_validation_ground_truth.txt"
    for files, message in (
        ({"k/data/meta.mat": b"MATLAB"}, r"no data/ILSVRC2012_validation_ground_truth\.txt in it"),
        ({"k/data/meta.mat": b"MATLAB", truth: b"1"}, "cannot be read"),
    ):
        labels.write_bytes(gzip.compress(packed(files, labels).read_bytes()))
        with pytest.raises(ValueError, match=message):
            run(tar, tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()
