"""Every notebook in a real JupyterLab in a real Chromium: run all cells, drive Stream and Stop.

Skipped where there is no Chromium, unless VLMLIB_NEEDS_BROWSER is set: then it is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
]
SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
OUTPUT = ".jp-OutputArea-output"
pytestmark = pytest.mark.browser


def find_chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None and not os.environ.get("VLMLIB_NEEDS_BROWSER"):
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    assert found, "VLMLIB_NEEDS_BROWSER is set, but there is no Chromium"
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own: (address, token). It keeps nothing and writes nothing back."""
    tmp = tmp_path_factory.mktemp("lab")
    for plugin, values in SETTINGS.items():
        file = tmp / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port, token = free_port(), secrets.token_hex(16)
    folders = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "DATA_DIR": "data"}
    env = os.environ | {f"JUPYTER_{k}": str(tmp / v) for k, v in folders.items()}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp / "workspaces"),
        "IPYTHONDIR": str(tmp / "ipython"),
        "JUPYTER_TOKEN": token,
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={ROOT}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += [f"--FileCheckpoints.checkpoint_dir={tmp / 'checkpoints'}"]
    with (tmp / "log").open("w") as log:
        server = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for_server(server, f"{address}/api/status?token={token}", tmp / "log")
            yield address, token
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(5)


def wait_for_server(server, url: str, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).read()
            return
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = find_chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("chromium")),
            executable_path=chromium,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )
        yield context
        context.close()


OPEN = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  let panel;
  while (!((panel = app.shell.currentWidget) && panel.sessionContext && panel.content.model))
    await new Promise(r => setTimeout(r, 100));
  await panel.context.ready;
  await panel.sessionContext.ready;
  const kernel = panel.sessionContext.session.kernel;
  await kernel.info;
  window.seen = {panel, hidden: []};
  kernel.iopubMessage.connect((_, m) => {   // errors that no cell shows: callbacks and threads
    const parent = (m.parent_header || {}).msg_type;
    if (m.header.msg_type === 'error' && parent !== 'execute_request')
      window.seen.hidden.push(m.content.ename + ': ' + m.content.evalue);
    if (m.header.msg_type === 'stream' && /Traceback /.test(m.content.text))
      window.seen.hidden.push(m.content.text);
  });
  await app.commands.execute('notebook:clear-all-cell-outputs');
}"""

RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)"

REPORT = """() => {
  const nodes = s => [...window.seen.panel.node.querySelectorAll(s)];
  const code = window.seen.panel.content.widgets.filter(w => w.model.type === 'code');
  const outputs = code.flatMap(w => w.model.toJSON().outputs || []);
  const inWords = i => i.closest('.jp-OutputArea-child')?.nextElementSibling
    ?.querySelector('details')?.textContent.length > 30;
  return {
    unrun: code.filter(w => w.model.executionCount == null && w.model.toJSON().source.length)
      .length,
    errors: outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue),
    hidden: window.seen.hidden,
    unrendered: nodes('.jp-OutputArea-output').map(n => n.innerText)
      .filter(t => /Loading widget|Error displaying widget|Error creating widget/i.test(t)),
    broken: nodes('.jp-Cell img').filter(i => i.complete && !i.naturalWidth).map(i => i.alt),
    silent: nodes('.jp-OutputArea-output img').filter(i => !i.alt && !inWords(i))
      .map(i => i.src.slice(0, 60)),
    cut: nodes('.widget-label').filter(n => n.scrollWidth > n.clientWidth + 1 && n.clientWidth)
      .map(n => n.textContent),
    panels: nodes('.jp-OutputArea-output button').filter(b => b.innerText.trim() === 'Stream')
      .length,
  };
}"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_in_jupyterlab(browser, lab, notebook):
    address, token = lab
    page = browser.new_page()
    try:
        path = notebook.relative_to(ROOT).as_posix()
        page.goto(f"{address}/lab/tree/{path}?reset&token={token}", timeout=60_000)
        page.wait_for_function("() => !!window.jupyterapp", timeout=60_000)
        page.evaluate(OPEN)
        page.evaluate(RUN_ALL)
        page.wait_for_timeout(1000)
        report = page.evaluate(REPORT)
        panels = report.pop("panels")
        assert {k: v for k, v in report.items() if v} == {}
        if panels:
            drive_panel(page)
        late = page.evaluate(REPORT)
        assert (late["errors"], late["hidden"]) == ([], [])
    finally:
        with contextlib.suppress(Exception):
            page.evaluate("() => window.seen.panel.sessionContext.shutdown()")
        page.close()


def drive_panel(page) -> None:
    """Stream makes the answer grow; Stop halts it at once, and the panel can stream again."""
    answer = page.locator(f"{OUTPUT} [aria-label=answer]").first
    status = page.locator(f"{OUTPUT} [role=status]").first

    def button(name):
        return page.locator(f"{OUTPUT} button").filter(has_text=name).first

    button("Stream").click()
    wait_until(lambda: len(answer.inner_text().strip()) > 10, "no text came")
    before = answer.inner_text()
    wait_until(lambda: len(answer.inner_text()) > len(before), "the text does not grow")
    button("Stop").click()
    wait_until(lambda: "stopped" in status.inner_text(), "Stop was not heard")
    stopped = answer.inner_text()
    page.wait_for_timeout(700)
    assert answer.inner_text() == stopped, "the text still grows after Stop"
    button("Stream").click()
    wait_until(lambda: 0 < len(answer.inner_text().strip()) < len(stopped), "no second stream")
    wait_until(lambda: "ended" in status.inner_text(), "the second stream did not end", 60)
    assert answer.inner_text().startswith(stopped[:10])


def wait_until(condition, message: str, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.05)
