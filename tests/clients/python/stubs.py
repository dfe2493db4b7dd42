"""What firecracker-python wants from the world besides a VMM, and has no part in what is tested: Docker, a firewall and
the public address of this machine. The client itself stays as it comes."""

import http.server
import os
import socketserver
import ssl
import subprocess
import sys
import threading
import types


def serve(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Docker(Quiet):
    """Is asked for its version when the client is made."""

    def do_GET(self):
        body = b'{"ApiVersion": "1.44", "MinAPIVersion": "1.24"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Internet(Quiet):
    """A proxy behind which is the one server that tells the client its address."""

    tls = None

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        with self.tls.wrap_socket(self.connection, server_side=True) as client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n192.0.2.2")
        self.close_connection = True


class Nftables:
    """Takes every rule. (Rules of tests have no business on whatever machine this is.)"""

    def set_json_output(self, _):
        pass

    def json_cmd(self, _):
        return 0, {"nftables": []}, ""

    def cmd(self, _):
        return 0, "", ""


def install(directory):
    """Must run before the client is imported."""
    docker = f"{directory}/docker.sock"
    serve(socketserver.ThreadingUnixStreamServer(docker, Docker))
    os.environ["DOCKER_HOST"] = f"unix://{docker}"

    key, certificate = f"{directory}/key.pem", f"{directory}/certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=ifconfig.me", "-addext", "subjectAltName=DNS:ifconfig.me"]
        + ["-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    Internet.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    Internet.tls.load_cert_chain(certificate, key)
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Internet)
    serve(proxy)
    os.environ["HTTPS_PROXY"] = os.environ["https_proxy"] = f"http://127.0.0.1:{proxy.server_port}"
    os.environ["REQUESTS_CA_BUNDLE"] = certificate

    sys.modules["nftables"] = types.SimpleNamespace(Nftables=Nftables)
