# make          builds the programs into bin/
# make demo     builds them and runs the main job on a real file
# make quick    tests that need nothing but Go
# make test     every check and every test there is
# make help     the other targets

GO      ?= go
BIN     := $(CURDIR)/bin
TOOLS   := $(CURDIR)/.cache/tools
BUILD   := github.com/dfcache/dfcache/cmd/internal/build
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)
LDFLAGS := -s -w -X $(BUILD).version=$(VERSION) -X $(BUILD).commit=$(COMMIT)

.PHONY: build demo quick test packages clients vet lint hooks generate crash powercut hostile mutants fuzz bench clean help

# Without gRPC's own trace pages a process starts faster.
build: ## build dfcache and dfdaemon into bin/
	CGO_ENABLED=0 $(GO) build -tags grpcnotrace -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./cmd/dfcache ./cmd/dfdaemon

demo: build ## import, stat, export, compare and delete a real file
	@PATH="$(BIN):$$PATH" sh integration/demo.sh

# Tests build and run the programs, of which go's cache of test results knows
# nothing.
quick: ## test something of every package, without root or anything installed
	$(GO) test -short -count=1 ./...

# What takes longest, and waits most, begins first. Without the tables of debuggers tests are
# linked sooner. What is missing fails.
test: packages vet clients ## everything that has to hold
	$(GO) test -race -count=1 -vet=off -ldflags=-w -timeout 15m ./integration ./p2p/swarm ./p2p/swarm/discovery ./p2p/pieces ./...

packages: ## install what the tests need; wants root, on Debian, where something is missing
	sh integration/packages.sh

# The tests find them in .cache/tools. Others are Debian's packages.
clients: $(TOOLS)/oras $(TOOLS)/crane $(TOOLS)/regctl ## registry clients that tests use

vet: ## formatting and go vet
	@unformatted=$$(gofmt -l $$(git ls-files '*.go' 2>/dev/null || find . -name '*.go')); \
	  if [ -n "$$unformatted" ]; then echo "run gofmt -w on: $$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags gendocs ./cmd/...

# To build golangci-lint takes longer than it may take in make test.
lint: vet $(TOOLS)/golangci-lint ## the same, and the linters of .golangci.yml
	$(TOOLS)/golangci-lint run --allow-parallel-runners ./...
	$(TOOLS)/golangci-lint run --allow-parallel-runners --build-tags gendocs ./cmd/...

hooks: ## have git check formatting, go vet and the subject at each commit
	git config core.hooksPath .githooks

# protoc is Debian's package protobuf-compiler; its plugins are tools of the
# module in integration/tools.
generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## make the generated files again
	PATH="$(TOOLS):$$PATH" protoc -I . --go_out=. --go_opt=paths=source_relative \
	  --go-grpc_out=. --go-grpc_opt=paths=source_relative p2p/rpc/pb/daemon.proto
	rm -rf docs/cli docs/man
	$(GO) run -tags gendocs ./cmd/dfcache doc --path docs/cli --format markdown
	$(GO) run -tags gendocs ./cmd/dfcache doc --path docs/man --format man
	$(GO) run -tags gendocs ./cmd/dfdaemon doc --path docs/cli --format markdown
	$(GO) run -tags gendocs ./cmd/dfdaemon doc --path docs/man --format man
	$(GO) run ./integration/api > docs/api.txt

crash: ## kill the daemon 10,000 times
	$(GO) test -timeout 6h -run 'TestCrash$$' -v ./integration -crash.cycles=10000

powercut: ## cut the power 2,000 times on each of three file systems; wants btrfs-progs, too
	$(GO) test -timeout 6h -run 'TestPowerCut$$' -v ./integration -powercut.cuts=2000 -powercut.steps=200 -powercut.fs=ext4,xfs,btrfs

hostile: ## 1,000 swarms in which half of the peers lie
	$(GO) test -timeout 2h -run 'TestHostile$$' ./p2p/swarm -swarm.hostile=1000

mutants: ## take out one defence after the other: a test has to notice each
	$(GO) run ./integration/mutants

fuzz: ## every fuzz target for a minute
	@for pkg in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
	    echo "$$pkg $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime 1m $$pkg || exit 1; \
	  done; done

bench: build clients $(TOOLS)/registry ## measure, and write docs/benchmarks.md; BEFORE=DIR has binaries to compare with
	$(GO) run ./integration/bench -bin $(BIN) -tools $(TOOLS) $(if $(BEFORE),-before $(BEFORE)) -out docs/benchmarks.md

clean: ## remove what was built
	rm -rf $(BIN) $(CURDIR)/.cache

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

# It has a module of its own, for the many others that it needs.
$(TOOLS)/golangci-lint: integration/tools/lint/go.mod integration/tools/lint/go.sum
	$(GO) -C integration/tools/lint build -o $(TOOLS)/ $$($(GO) -C integration/tools/lint list tool)

$(TOOLS)/%: integration/tools/go.mod integration/tools/go.sum
	$(GO) -C integration/tools build -o $(TOOLS)/ $$($(GO) -C integration/tools list tool | grep '/$*$$')
