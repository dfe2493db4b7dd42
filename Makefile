# Tranche's house keeping. `make` alone says what there is.
TARGET  := x86_64-unknown-linux-gnu
CARGO   ?= cargo
PREFIX  ?= /usr/local
RELEASE := target/$(TARGET)/release/tranche
TESTED  := target/$(TARGET)/test-release/tranche
GUEST   := $(CURDIR)/target/guest

# All integration tests but `linux`, which needs real guests and so has a runner of its own.
NATIVE  := $(filter-out linux,$(notdir $(patsubst %/,%,$(dir $(wildcard tests/*/main.rs))) $(basename $(wildcard tests/*.rs))))
SCRIPTS := $(shell grep -lE '^\#!/bin/(ba)?sh' .ci/run $$(find tests resources fuzz -type f)) \
           resources/linux/initrd-init tests/lab/init

.DEFAULT_GOAL := help
.PHONY: help run test lint bench soak install deb manual clean release setup guest clients small-kernel

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: release setup guest ## boot Debian's cloud kernel to a shell (in an emulated machine without VT-x or AMD-V)
	@resources/linux/run $(RELEASE) $(GUEST)

test: setup guest clients ## run all tests, those with real guests too
	$(CARGO) test --profile test-release --lib --bins --examples $(addprefix --test ,$(NATIVE))
	$(CARGO) test --profile test-release --doc
	TRANCHE_GUEST_DIR=$(GUEST) CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$(CURDIR)/tests/lab/run-tests \
		$(CARGO) test --profile test-release --test linux
	TRANCHE_GUEST_DIR=$(GUEST) TRANCHE=$(CURDIR)/$(TESTED) tests/lab/power-loss

lint: ## check format, code and scripts
	$(CARGO) fmt --check
	$(CARGO) fmt --check --manifest-path fuzz/Cargo.toml
	$(CARGO) fmt --check --manifest-path tests/clients/fctools/Cargo.toml
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --lib --features fuzzing -- -D warnings
	@if command -v cargo-deny > /dev/null; then $(CARGO) deny check licenses bans sources; \
	else echo "cargo-deny is not installed: licences go unchecked"; fi
	@if command -v shellcheck > /dev/null; then echo shellcheck; shellcheck $(SCRIPTS); \
	else echo "shellcheck is not installed: the scripts go unchecked"; fi

bench: release setup guest ## measure speed and size, and compare with QEMU
	tests/bench/run
	tests/bench/compare/run

soak: release setup guest ## run guests for long
	tests/soak/run

manual: ## write man pages and shell completions to target/manual
	$(CARGO) run --quiet --example manual target/manual

install: release manual ## install program, man pages, completions, systemd units and profiles below $(DESTDIR)$(PREFIX)
	install -D -m 755 $(RELEASE) $(DESTDIR)$(PREFIX)/bin/tranche
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 target/manual/man1/*.1
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/bash-completion/completions target/manual/bash/tranche
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/zsh/site-functions target/manual/zsh/_tranche
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d target/manual/fish/tranche.fish
	sed 's|/usr/bin/|$(PREFIX)/bin/|' resources/systemd/tranche@.service > target/manual/tranche@.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system target/manual/tranche@.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/user target/manual/tranche@.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/tranche/apparmor resources/apparmor/tranche
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/tranche/tomoyo resources/tomoyo/*.conf

deb: release manual ## make a Debian package in target/debian (with cargo-deb)
	@command -v cargo-deb > /dev/null || { echo "cargo-deb is not installed: cargo install cargo-deb" >&2; exit 1; }
	cargo-deb --no-build --no-strip --target $(TARGET) --output target/debian/

clean: ## remove everything that was built (downloads stay in ~/.cache/tranche)
	$(CARGO) clean

release: ## build the program
	$(CARGO) build --release
	@! grep -aq TRANCHE_ATTACK $(RELEASE) || { echo "the hook for tests of the jail is in the release" >&2; exit 1; }

setup: ## install the Debian packages that tests and guests need, or say which
	@tests/lab/setup

guest: setup ## build the guest images in target/guest
	@resources/linux/fetch-kernel cloud $(GUEST)
	@resources/linux/build-initrd cloud $(GUEST)
	@resources/linux/fetch-kernel generic $(GUEST)
	@resources/linux/build-initrd generic $(GUEST)
	@resources/linux/build-rootfs $(GUEST)
	@resources/linux/build-roots $(GUEST)
	@resources/kernel/build --cached $(GUEST)

clients: setup ## get the clients that drive the API in tests, in target/clients
	@tests/clients/prepare

small-kernel: ## build the small kernel for MMIO guests, in target/guest/small (ten minutes, once)
	@resources/kernel/build $(GUEST)
