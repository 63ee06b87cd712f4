"""push, pull and hub ids against a hub on this machine, through the hub's real client."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import fake_hub
from command import contents, nsae
from fake_hub import TOKEN, FakeHub
from nsae_cli import interrupt, load_sae
from nsae_cli.interop.hub import HubReference

REPO = "org/saes"
GOLDEN = Path(__file__).parents[1] / "interop" / "golden"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """An empty hub that this process asks, with a token."""
    with fake_hub.serve() as made:
        fake_hub.use(made, monkeypatch, tmp_path / "cache")
        yield made


@pytest.fixture
def group(workspace: Path) -> Path:
    """The folder of two SAEs, L2-relu and L2-tanh-relu."""
    [folder] = (workspace / "saes").iterdir()
    return folder


def push(workspace: Path, sae: str, *options: str, repo: str = REPO):
    return nsae("--workspace", workspace, "push", sae, repo, *options)


def pull(workspace: Path, reference: str, *options: str):
    return nsae("--workspace", workspace, "pull", reference, *options)


def sent(hub: FakeHub) -> list[str]:
    """The requests that change something."""
    return [one for one in hub.requests if not one.startswith(("GET", "HEAD"))]


# Push -----------------------------------------------------------------------------------------------------------------


def test_a_group_is_on_the_hub_as_it_is_here(hub: FakeHub, workspace: Path, group: Path):
    said = push(workspace, group.name, "--yes", "--license", "mit")
    assert said.code == 0, said.err
    made = hub.repositories[REPO]
    assert made.private
    assert len(made.commits) == 2  # the empty repository, and everything at once
    assert said.out.strip() == f"{hub.endpoint}/{REPO}"
    on_hub = {name: content for name, content in made.files.items() if name.startswith("L2-")}
    here = {name: content for name, content in contents(group).items() if name != "group.json"}
    assert on_hub == here
    card = made.files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "nsae",
        "tags": ["sparse-autoencoder", "saelens", "nsae", "interpretability"],
        "license": "mit",
    }
    for part in ("mini-sink", "builtin", "`blocks.2.hook_resid_post`", "| without sinks |", "| norm bin 9, ‖x‖ from"):
        assert part in card
    run = json.loads((group / "L2-relu" / "run.json").read_text())
    metrics = run["metrics"]["ns"]
    assert f"| without sinks | {metrics['tokens']} | {metrics['l0']:.1f} | {metrics['fvu_p0']:.3f} |" in card
    # Once more: nothing is sent that is there, and no commit is made.
    uploaded = list(hub.uploaded)
    again = push(workspace, group.name, "--yes")
    assert again.code == 0
    assert "already there, unchanged" in again.err
    assert len(made.commits) == 2
    assert hub.uploaded == uploaded


def test_the_card_tells_of_what_is_there_already(hub: FakeHub, workspace: Path, group: Path):
    assert push(workspace, f"{group.name}/L2-relu", "--yes", "--license", "mit").code == 0
    first = hub.repositories[REPO].files["README.md"].decode()
    assert yaml.safe_load(first.split("---\n")[1])["library_name"] == "saelens"
    assert "A sparse autoencoder (SAE) on `blocks.2.hook_resid_post` of mini-sink: 96 features" in first
    assert push(workspace, f"{group.name}/L2-tanh-relu", "--yes", repo=f"hf://{REPO}/tanh/one").code == 0
    files = hub.repositories[REPO].files
    assert {"L2-relu/run.json", "tanh/one/run.json"} <= set(files)
    card = files["README.md"].decode()
    assert "2 sparse autoencoders" in card
    assert "`tanh/one`" in card
    assert "license: mit" in card  # of the card that was there


def test_a_card_that_somebody_else_wrote_is_left_alone(hub: FakeHub, workspace: Path, group: Path):
    hub.add(REPO, {"README.md": b"# Mine\n"}, private=True)
    said = push(workspace, f"{group.name}/L2-relu", "--yes")
    assert said.code == 0, said.err
    assert hub.repositories[REPO].files["README.md"] == b"# Mine\n"
    assert "L2-relu/run.json" in hub.repositories[REPO].files


def blocks(card: str) -> list[str]:
    """The Python code of a card."""
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize("cell", ["L2-relu", "L2-tanh-relu"])
def test_the_cards_code_computes_what_the_sae_computes(hub: FakeHub, workspace: Path, group: Path, cell: str):
    assert push(workspace, f"{group.name}/{cell}", "--yes").code == 0
    with_nsae, with_saelens, with_torch = blocks(hub.repositories[REPO].files["README.md"].decode())
    sae = load_sae(group / cell)
    for code in (with_nsae, with_torch):
        names: dict[str, object] = {}
        exec(code, names)
        acts, x_hat = sae.encode(names["x"]), sae(names["x"])
        assert (acts > 0).any()
        torch.testing.assert_close(names["acts"], acts)
        torch.testing.assert_close(names["x_hat"], x_hat)
    assert f'SAE.from_pretrained("{REPO}", "{cell}")' in with_saelens
    assert ("saelens.register()" in with_saelens) == (cell == "L2-tanh-relu")


@pytest.mark.parametrize(
    ("options", "saved"), [(("topk", "--k", "8"), "topk"), (("batchtopk", "--k", "8"), "jumprelu"), (("relu",), "relu")]
)
def test_the_card_of_every_activation(hub: FakeHub, workspace: Path, options: tuple[str, ...], saved: str):
    trained = nsae("--workspace", workspace, "train", "--act", *options, "--d-sae", "96", "--batch-size", "256",
                   "--tokens", "20k", "--device", "cpu", "--name", "one")  # fmt: skip
    assert trained.code == 0, trained.err
    assert push(workspace, "one", "--yes").code == 0
    code = blocks(hub.repositories[REPO].files["README.md"].decode())[2]
    names: dict[str, object] = {}
    exec(code, names)
    sae = load_sae(workspace / "saes" / "one")
    assert sae.act == saved
    torch.testing.assert_close(names["acts"], sae.encode(names["x"]))
    torch.testing.assert_close(names["x_hat"], sae(names["x"]))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_saelens_loads_from_the_hub_as_the_card_says(hub: FakeHub, workspace: Path, group: Path):
    pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    assert push(workspace, group.name, "--yes").code == 0
    codes = [code for code in blocks(hub.repositories[REPO].files["README.md"].decode()) if "sae_lens" in code]
    assert len(codes) == 2
    for code, cell in zip(codes, ("L2-relu", "L2-tanh-relu"), strict=True):
        names: dict[str, object] = {}
        exec(code, names)
        sae = load_sae(group / cell)
        torch.testing.assert_close(names["acts"], sae.encode(names["x"]))
        torch.testing.assert_close(names["x_hat"], sae(names["x"]))


def test_a_dry_run_shows_everything_and_sends_nothing(hub: FakeHub, workspace: Path, group: Path):
    said = push(workspace, group.name, "--dry-run")
    assert said.code == 0
    for part in ("2 SAEs to org/saes", "(new, private)", "L2-relu/", "run.json", "sae_weights.safetensors", "11 files"):
        assert part in said.out
    assert sent(hub) == []
    size = sum(len(content) for name, content in contents(group).items() if name != "group.json")
    described = nsae("--workspace", workspace, "--json", "push", group.name, REPO, "--dry-run").json["result"]
    assert described["bytes"] == size + described["card"]["bytes"]
    assert (described["uploaded"], described["private"], described["exists"]) == (False, True, False)


def test_a_dry_run_needs_neither_hub_nor_token(hub: FakeHub, workspace: Path, group: Path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = push(workspace, group.name, "--dry-run")
    assert (said.code, hub.requests) == (0, [])
    assert "not looked at" in said.out
    assert "the hub was not asked what it has" in said.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "there"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_it_shows_and_asks(hub: FakeHub, workspace: Path, group: Path, monkeypatch, answer: str, there: bool):
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    said = push(workspace, f"{group.name}/L2-relu")
    assert said.code == 0, said.err
    assert "sae_weights.safetensors" in said.err
    assert "Upload? [y/N]" in said.err
    assert (REPO in hub.repositories) == there
    assert ("nothing was uploaded" in said.err) != there


def test_without_a_terminal_nothing_is_asked_of_anybody(hub: FakeHub, workspace: Path, group: Path):
    said = push(workspace, group.name)
    assert (said.code, hub.requests) == (2, [])
    assert "give --yes, or --dry-run" in said.message


@pytest.mark.parametrize("public", [True, False])
def test_who_may_see_it(hub: FakeHub, workspace: Path, group: Path, public: bool):
    cell = f"{group.name}/L2-relu"
    if public:
        assert push(workspace, cell, "--yes", "--public").code == 0
        assert not hub.repositories[REPO].private
        refused = push(workspace, cell, "--yes")
        assert "org/saes is public, so that anybody could see" in refused.message
        return
    hub.add(REPO, {}, private=True)
    refused = push(workspace, cell, "--yes", "--public")
    assert "is there and private" in refused.message
    assert refused.code == 2
    assert sent(hub) == []


def test_what_is_not_whole_is_not_sent(hub: FakeHub, workspace: Path, group: Path):
    weights = group / "L2-relu" / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    said = push(workspace, group.name, "--yes")
    assert said.code == 3
    assert "sae_weights.safetensors: not what was written" in said.message
    assert "nothing was uploaded" in said.message
    (group / "L2-relu" / "run.json").unlink()
    said = push(workspace, group.name, "--yes")
    assert said.code == 3
    assert "1 of its 2 SAEs are not finished, such as L2-relu" in said.message
    assert hub.requests == []


def test_another_packages_sae_is_not_pushed(hub: FakeHub, workspace: Path):
    said = push(workspace, str(GOLDEN / "saelens6-standard"), "--yes")
    assert said.code == 3
    assert "`hf upload`" in said.message


@pytest.mark.parametrize("repo", ["saes", "hf://datasets/org/saes", "org/saes@main", "org/saes:../x", "a/b/c"])
def test_places_that_are_none(hub: FakeHub, workspace: Path, group: Path, repo: str):
    said = push(workspace, group.name, "--yes", repo=repo)
    assert (said.code, hub.requests) == (2, [])
    assert said.message.startswith(f"REPO {repo!r}")
    refused = push(workspace, group.name, "--yes", "--license", "My Own!")
    assert "expected an identifier such as mit" in refused.message


# Failures -------------------------------------------------------------------------------------------------------------


def test_no_token_and_a_wrong_one(hub: FakeHub, workspace: Path, group: Path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = push(workspace, group.name, "--yes")
    assert (said.code, hub.requests) == (4, [])
    assert said.message.endswith("run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "hf_anotherSecret")
    said = push(workspace, group.name, "--yes")
    assert said.code == 4
    assert "does not know the token of this machine; run `hf auth login`" in said.message
    assert pull(workspace, REPO).message == (
        "REPO org/saes: the Hugging Face hub does not know the token of this machine; run `hf auth login`"
    )
    assert sent(hub) == []


def test_a_token_that_may_not_write(hub: FakeHub, workspace: Path, group: Path):
    hub.may_write = False
    said = push(workspace, group.name, "--yes")
    assert said.code == 4
    assert "the hub refuses it (the token may not write there)" in said.message


def test_repositories_that_are_not_there_or_not_for_everybody(hub: FakeHub, workspace: Path):
    said = pull(workspace, REPO)
    assert (said.code, "the hub has no such model, or it is private" in said.message) == (4, True)
    hub.add(REPO, {"sae/cfg.json": b"{}"}, gated=True)
    said = pull(workspace, REPO)
    assert (said.code, "access is restricted; run `hf auth login`" in said.message) == (4, True)
    said = nsae("--workspace", workspace, "push", next((workspace / "saes").iterdir()).name, REPO, "--yes")
    assert (said.code, "access is restricted" in said.message) == (4, True)


@pytest.mark.parametrize("where", [r"PUT /blobs", r"/commit/main", r"/preupload/main", r"objects/batch"])
def test_a_hub_that_dies_midway(hub: FakeHub, workspace: Path, group: Path, where: str):
    hub.add(REPO, {"mine.txt": b"1"}, private=True)
    hub.breaks[where] = 1 if "commit" not in where else 0
    said = push(workspace, group.name, "--yes")
    assert said.code == 4
    assert "the upload broke off (no connection), the repository is unchanged; run the same command" in said.message
    assert hub.repositories[REPO].files == {"mine.txt": b"1"}
    before = list(hub.uploaded)
    hub.breaks.clear()
    assert push(workspace, group.name, "--yes").code == 0
    # What had arrived was not sent again: four large files in all, each once.
    assert len(hub.uploaded) == 4
    assert hub.uploaded[: len(before)] == before
    assert len(hub.repositories[REPO].commits) == 2


def test_a_signal_stops_it_before_the_commit(hub: FakeHub, workspace: Path, group: Path, monkeypatch):
    hub.on_upload = lambda: monkeypatch.setattr(interrupt, "_signum", 2)
    said = push(workspace, group.name, "--yes")
    assert said.code == 130
    assert "stopped before the commit, so that the repository is unchanged" in said.message
    assert len(hub.uploaded) == 2  # of the first SAE
    assert len(hub.repositories[REPO].commits) == 1
    hub.on_upload = lambda: None
    assert push(workspace, group.name, "--yes").code == 0
    assert len(hub.uploaded) == 4


def test_a_repository_that_ignores_files(hub: FakeHub, workspace: Path, group: Path):
    hub.ignores = (".jsonl",)
    said = push(workspace, f"{group.name}/L2-relu", "--yes")
    assert said.code == 4
    assert "left out 1 files, such as L2-relu/metrics.jsonl" in said.message


def test_the_token_is_nowhere(hub: FakeHub, workspace: Path, group: Path, monkeypatch):
    """In nothing that is printed, with --debug and -v, nor in any file, whatever the hub answers."""
    said = []

    def both(*arguments: str) -> None:
        for options in (("-v",), ("--debug",)):
            said.append(nsae("--workspace", workspace, *options, *arguments))

    both("push", f"{group.name}/L2-relu", REPO, "--yes")
    both("pull", f"{REPO}:L2-relu", "--name", "again")
    hub.may_write = False
    both("push", f"{group.name}/L2-tanh-relu", REPO, "--yes")  # the answer quotes the token
    hub.may_write = True
    hub.breaks["PUT"] = 0
    both("push", f"{group.name}/L2-tanh-relu", REPO, "--yes")
    secrets = [TOKEN]
    # Characters that no token has: the client would quote it in its complaint about the header.
    for secret in ("hf_broken\tSecret", "hf_brökenSecret"):
        monkeypatch.setenv("HF_TOKEN", secret)
        both("push", f"{group.name}/L2-relu", REPO, "--yes")
        both("pull", f"{REPO}:L2-relu", "--name", "more")
        secrets += [secret, "brokenSecret", "kenSecret"]
    assert [one.code for one in said] == [0, 0, 0, 0] + [4] * 12
    written = [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    for secret in secrets:
        assert [one for one in said if secret in one.out + one.err] == []
        assert not any(secret.encode() in content for content in written)


# Pull -----------------------------------------------------------------------------------------------------------------


def pushed(workspace: Path, group: Path) -> None:
    assert push(workspace, group.name, "--yes").code == 0


def test_a_pulled_group_is_the_one_that_was_pushed(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    pushed(workspace, group)
    elsewhere = tmp_path / "elsewhere"
    said = pull(elsewhere, f"hf://{REPO}", "--name", "mine")
    assert said.code == 0, said.err
    here = {name: content for name, content in contents(group).items() if name != "group.json"}
    assert contents(elsewhere / "saes" / "mine") == here
    assert nsae("--workspace", elsewhere, "verify", "mine").code == 0
    before = contents(elsewhere)
    again = pull(elsewhere, REPO, "--name", "mine")
    assert (again.code, "already complete" in again.err) == (0, True)
    assert contents(elsewhere) == before
    taken = pull(elsewhere, f"{REPO}:L2-relu", "--name", "mine")
    assert (taken.code, "holds something else" in taken.message) == (2, True)
    timings = (elsewhere / "saes/mine/L2-relu/timings.jsonl").read_text()
    assert json.loads(timings)["repository"] == REPO  # where from: the one file that may say it


def test_a_pulled_sae_is_analysed_as_the_one_that_was_trained(hub: FakeHub, workspace: Path, group: Path):
    pushed(workspace, group)
    assert pull(workspace, f"{REPO}:L2-tanh-relu", "--name", "back").code == 0
    results = {}
    for name in ("back", f"{group.name}/L2-tanh-relu", f"hf://{REPO}/L2-tanh-relu"):
        said = nsae("--workspace", workspace, "--json", "analyze-top-norms", name, "--top", "3%", "--name",
                    f"of-{len(results)}")  # fmt: skip
        assert said.code == 0, said.err
        results[name] = {key: value for key, value in said.json["result"].items()
                         if key not in ("sae", "checksum")}  # fmt: skip
    back, trained, from_hub = results.values()
    assert back == trained == from_hub


def test_an_older_revision(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    cell = group / "L2-relu"
    assert push(workspace, f"{group.name}/L2-relu", "--yes", repo=f"{REPO}:one").code == 0
    first = hub.repositories[REPO].commits[-1][0]
    other = f"{group.name}/L2-tanh-relu"
    assert push(workspace, other, "--yes", repo=f"{REPO}:one").code == 0
    elsewhere = tmp_path / "elsewhere"
    for name, options in (("a", ("--revision", first)), ("b", ())):
        assert pull(elsewhere, f"{REPO}:one", "--name", name, *options).code == 0
    assert pull(elsewhere, f"{REPO}@{first}:one", "--name", "c").code == 0
    assert contents(elsewhere / "saes/a") == contents(elsewhere / "saes/c") == contents(cell)
    assert contents(elsewhere / "saes/b") == contents(group / "L2-tanh-relu")
    said = pull(elsewhere, f"{REPO}@{first}:one", "--revision", "main")
    assert (said.code, "name different revisions" in said.message) == (2, True)
    said = pull(elsewhere, f"{REPO}:one", "--revision", "nowhere")
    assert (said.code, "no revision 'nowhere'" in said.message) == (4, True)


def test_what_was_damaged_on_its_way_is_not_taken(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    pushed(workspace, group)
    files = hub.repositories[REPO].files
    weights = bytearray(files["L2-relu/sae_weights.safetensors"])
    weights[-3] ^= 1
    hub.repositories[REPO].commit({**files, "L2-relu/sae_weights.safetensors": bytes(weights)})
    elsewhere = tmp_path / "elsewhere"
    said = pull(elsewhere, f"{REPO}:L2-relu")
    assert said.code == 3
    assert "sae_weights.safetensors: not what was written (SHA-256 differs)" in said.message
    assert not elsewhere.exists()


def test_a_download_that_breaks_off(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    pushed(workspace, group)
    hub.breaks[r"GET .*/resolve/.*sae_weights"] = 0
    elsewhere = tmp_path / "elsewhere"
    said = pull(elsewhere, f"{REPO}:L2-relu")
    assert said.code == 4
    assert "the download failed; try again" in said.message
    assert not elsewhere.exists()
    hub.breaks.clear()
    assert pull(elsewhere, f"{REPO}:L2-relu").code == 0
    assert contents(elsewhere / "saes/L2-relu") == contents(group / "L2-relu")


def test_from_the_cache_where_the_hub_is_not_there(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    pushed(workspace, group)
    assert pull(tmp_path / "a", f"{REPO}:L2-relu").code == 0
    hub.breaks["."] = 0
    assert pull(tmp_path / "b", f"{REPO}:L2-relu").code == 0
    said = pull(tmp_path / "c", f"{REPO}:L2-tanh-relu")
    assert (said.code, "the SAE is not in the local cache" in said.message) == (4, True)


def test_saes_of_other_packages_stay_what_they_are(hub: FakeHub, workspace: Path, tmp_path: Path):
    hub.add_folder("org/lens", GOLDEN / "saelens6-topk", "blocks.6.hook_resid_pre")
    hub.add_folder("org/many", GOLDEN / "saelens6-topk", "a")
    hub.repositories["org/many"].commit({**hub.repositories["org/many"].files, "b/sae_weights.safetensors": b""})
    run = GOLDEN / "sparsify"
    hub.add("org/sparsify", {path.relative_to(run).as_posix(): path.read_bytes()
                             for path in run.rglob("*") if path.is_file()})  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    said = pull(elsewhere, "org/lens:blocks.6.hook_resid_pre")
    assert said.code == 0, said.err
    kept = contents(elsewhere / "saes" / "blocks.6.hook_resid_pre")
    assert sorted(kept) == ["cfg.json", "sae_weights.safetensors"]
    assert kept["cfg.json"] == (GOLDEN / "saelens6-topk" / "cfg.json").read_bytes()
    # sparsify says by names of folders where an SAE reads, and above them what it was trained on.
    said = nsae("--workspace", elsewhere, "--json", "pull", "org/sparsify:h.6", "--name", "sparse")
    assert said.code == 0, said.err
    assert said.json["artifact"]["name"] == "sparse/h.6"
    assert (said.json["result"]["hook"], said.json["result"]["model"]) == ("blocks.6.hook_resid_post", "gpt2")
    assert pull(elsewhere, "org/sparsify:h.6", "--name", "sparse").code == 0
    several = pull(elsewhere, "org/many")
    assert (several.code, "holds 2 SAEs: a, b; name one, as org/many:a" in several.message) == (2, True)
    listed = {row["name"]: row for row in nsae("--workspace", elsewhere, "--json", "list").json["result"]}
    assert {name: row["status"] for name, row in listed.items()} == {
        "blocks.6.hook_resid_pre": "complete",
        "sparse": "complete",
    }
    checked = nsae("--workspace", elsewhere, "--json", "verify")
    assert [row["state"] for row in checked.json["result"]] == ["ok", "ok"]
    said = nsae("--workspace", elsewhere, "analyze-top-norms", "blocks.6.hook_resid_pre")
    assert said.code == 3
    assert "`nsae audit blocks.6.hook_resid_pre` measures it" in said.message


def test_a_pulled_sae_of_another_package_is_audited(hub: FakeHub, workspace: Path, group: Path, tmp_path: Path):
    exported = nsae("--workspace", workspace, "export", f"{group.name}/L2-relu", "--to", "saelens", "--out",
                    tmp_path / "out")  # fmt: skip
    assert exported.code == 0
    hub.add_folder("org/lens", tmp_path / "out", "sae")
    assert pull(workspace, "org/lens:sae", "--name", "lens").code == 0
    metrics = []
    for sae in ("lens", "hf://org/lens/sae", tmp_path / "out"):
        said = nsae("--workspace", workspace, "--json", "audit", sae, "--tokens", "1280", "--no-behaviour", "--corpus",
                    "builtin", "--split", "heldout", "--device", "cpu", "--name", f"a{len(metrics)}")  # fmt: skip
        assert said.code == 0, said.err
        metrics.append(said.json["result"]["metrics"]["all"])
        assert said.json["result"]["sae"]["format"] == "SAELens"
    assert metrics[0] == metrics[1] == metrics[2]


def test_only_pickles(hub: FakeHub, workspace: Path):
    hub.add("org/pickles", {"ae.pt": b"", "config.json": b"{}"})
    said = pull(workspace, "org/pickles")
    assert said.code == 3
    assert "`hf download org/pickles --include '*' --local-dir DIR`, then convert" in said.message


# Ids where SAEs are named ---------------------------------------------------------------------------------------------


def test_commands_that_take_hub_ids_and_those_that_do_not(hub: FakeHub, workspace: Path, group: Path):
    pushed(workspace, group)
    said = nsae("--workspace", workspace, "eval", f"{REPO}:L2-relu", "--device", "cpu")
    assert said.code == 0, said.err
    assert (workspace / "evals" / "org-saes-L2-relu" / "eval.json").is_file()
    said = nsae("--workspace", workspace, "analyze-top-norms", REPO)
    assert said.code == 0, said.err
    for cell in ("L2-relu", "L2-tanh-relu"):
        assert (workspace / "top-norms" / f"org-saes-{cell}" / "top_norms.json").is_file()
    for command in (("compare",), ("report",), ("plot", "training")):
        said = nsae("--workspace", workspace, *command, f"{REPO}:L2-relu")
        assert said.code == 2
        assert f"run `nsae pull {REPO}:L2-relu` first" in said.message


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/repo", ("org/repo", "", None)),
        ("org/repo:a/b", ("org/repo", "a/b", None)),
        ("org/repo:a/", ("org/repo", "a", None)),
        ("org/repo@v1:a", ("org/repo", "a", "v1")),
        ("org/repo@refs/pr/1:a", ("org/repo", "a", "refs/pr/1")),
        ("hf://org/repo", ("org/repo", "", None)),
        ("hf://org/repo/a/b.pt", ("org/repo", "a/b.pt", None)),
        ("hf://models/org/repo/a", ("org/repo", "a", None)),
        ("hf://org/repo@refs%2Fpr%2F1/a", ("org/repo", "a", "refs/pr/1")),
        ("hf://org/repo:a/b", ("org/repo", "a/b", None)),
        ("hf://datasets/org/repo", None),
        ("hf://spaces/org/repo", None),
        ("hf://org", None),
        ("org", None),
        ("a/b/c", None),
        ("org/repo:../a", None),
        ("org/repo:/etc", None),
        ("hf://org/repo/../../etc", None),
        ("org/repo@:a", None),
        ("s3://bucket/key", None),
        ("", None),
    ],
)
def test_what_an_id_names(reference: str, expected: tuple[str, str, str | None] | None):
    found = HubReference.parse(reference)
    assert (found and (found.repository, found.folder, found.revision)) == expected
    assert found is None or HubReference.parse(str(found)) == found


@pytest.mark.parametrize("command", ["analyze-top-norms", "eval", "audit", "export"])
def test_a_typo_in_a_cells_name_is_no_hub_id(hub: FakeHub, workspace: Path, group: Path, command: str):
    more = ("--to", "saelens") if command == "export" else ()
    said = nsae("--workspace", workspace, command, f"{group.name}/L2-rleu", *more)
    assert (said.code, hub.requests) == (2, [])
    assert f"there are: {group.name}/L2-" in said.message


# As a user has it -----------------------------------------------------------------------------------------------------


def test_in_a_process_of_its_own(workspace: Path, group: Path, tmp_path: Path):
    """The endpoint and the token from the environment, no patch anywhere."""
    keep = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "HOME") if key in os.environ}
    with fake_hub.serve() as hub:
        environment = {**keep, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
                       "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        program = "from nsae_cli.cli.app import main; main()"

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", program, "--workspace", str(workspace), *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

        made = run("push", group.name, REPO, "--yes")
        assert made.returncode == 0, made.stderr
        shutil.rmtree(group)
        back = run("pull", REPO, "--name", group.name)
        assert back.returncode == 0, back.stderr
        assert TOKEN not in made.stdout + made.stderr + back.stdout + back.stderr
    assert sorted(path.name for path in group.iterdir()) == ["L2-relu", "L2-tanh-relu"]
