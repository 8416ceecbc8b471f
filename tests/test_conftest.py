"""The blocked network holds in the tests and in what they start, and leaves loopback alone."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

ELSEWHERE = ("192.0.2.1", 80)  # reserved for documentation (RFC 5737): nobody answers there


def test_no_connection_leaves_this_machine():
    with socket.socket() as tcp, pytest.raises(OSError, match="blocked in tests") as caught:
        tcp.connect(ELSEWHERE)
    assert caught.value.errno == errno.ENETUNREACH
    with socket.socket() as tcp, pytest.raises(OSError, match="blocked in tests"):
        tcp.connect_ex(ELSEWHERE)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, pytest.raises(OSError, match="blocked in tests"):
        udp.sendto(b"", ELSEWHERE)
    with pytest.raises(OSError, match="blocked in tests"):
        socket.getaddrinfo("huggingface.co", 443)
    with pytest.raises(urllib.error.URLError, match="blocked in tests"):
        urllib.request.urlopen("http://pypi.org/")


def test_no_connection_leaves_a_process_started_by_a_test():
    code = f"import socket; socket.create_connection({ELSEWHERE!r}, timeout=5)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 1 and "NetworkBlocked" in child.stderr


def test_loopback_works():
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"here")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for host in ("127.0.0.1", "localhost"):
            with urllib.request.urlopen(f"http://{host}:{server.server_port}/", timeout=10) as answer:
                assert answer.read() == b"here"
    finally:
        server.shutdown()
        server.server_close()


def test_the_shell_does_not_steer_the_tests():
    assert "CONFIG_PATH" not in os.environ and "ENV" not in os.environ
    assert os.environ["HF_HUB_OFFLINE"] == "1" and "sana_tune-tests-" in os.environ["HF_HOME"]


@pytest.mark.parametrize("module, is_ours", [("sana_tune.data.order", True), ("scripts.nano", True), ("torch", False)])
def test_a_warning_of_our_own_code_is_an_error(module, is_ours):
    with warnings.catch_warnings(record=not is_ours):
        if is_ours:
            with pytest.raises(DeprecationWarning):
                warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
        else:
            warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
