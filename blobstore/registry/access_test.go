package registry

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/digest"
)

// hashed returns a line of a password file.
func hashed(t *testing.T, name, password string) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return name + ":" + string(hash) + "\n"
}

// clock is a time that only a test moves.
type clock struct{ elapsed atomic.Int64 }

func (c *clock) now() time.Time          { return time.Unix(1e9, c.elapsed.Load()) }
func (c *clock) advance(d time.Duration) { c.elapsed.Add(int64(d)) }

// door is an Access with everything around it.
type door struct {
	*Access
	t     *testing.T
	path  string // of the password file
	clock clock
	log   bytes.Buffer
	calls int // of the handler behind it
}

// newDoor has the users alice, bob and carol, whose passwords are "secret-" and
// their name. Carol is not among the names of any right.
func newDoor(t *testing.T, read, write string) *door {
	t.Helper()
	d := &door{t: t, path: filepath.Join(t.TempDir(), "htpasswd")}
	content := "# users\n\n"
	for _, name := range []string{"alice", "bob", "carol"} {
		content += hashed(t, name, "secret-"+name)
	}
	d.write(content)
	d.open(read, write)
	return d
}

func (d *door) write(content string) {
	d.t.Helper()
	if err := errors.Join(os.WriteFile(d.path, []byte(content), 0o600), os.Chmod(d.path, 0o600)); err != nil {
		d.t.Fatal(err)
	}
}

func (d *door) open(read, write string) {
	d.t.Helper()
	var who [2]Who
	for i, s := range []string{read, write} {
		var err error
		if who[i], err = ParseWho(s); err != nil {
			d.t.Fatal(err)
		}
	}
	var err error
	if d.Access, err = NewAccess(AccessOptions{
		Htpasswd: d.path, Read: who[0], Write: who[1], Log: slog.New(slog.NewTextHandler(&d.log, nil))}); err != nil {
		d.t.Fatal(err)
	}
	d.Access.now, d.looked = d.clock.now, d.clock.now()
}

func (d *door) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	d.calls++
	io.WriteString(w, "content")
}

func basic(name, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"+password))
}

// login is what the user sends.
func login(name string) string { return basic(name, "secret-"+name) }

func (d *door) request(method, path, authorization, remote string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	if remote != "" {
		r.RemoteAddr = remote
	}
	w := httptest.NewRecorder()
	d.Wrap(d).ServeHTTP(w, r)
	return w
}

// want checks what is answered, and that only what is let through reaches the
// handler.
func (d *door) want(status int, method, path, authorization string) {
	d.t.Helper()
	before := d.calls
	w := d.request(method, path, authorization, "")
	if w.Code != status {
		d.t.Errorf("%s %s %s: status %d, want %d", method, path, authorization, w.Code, status)
		return
	}
	if through := d.calls > before; through != (status == 200) {
		d.t.Errorf("%s %s %s: status %d, and the handler was called: %v", method, path, authorization, status, through)
	}
	code := map[int]string{401: "UNAUTHORIZED", 403: "DENIED", 429: "TOOMANYREQUESTS"}[status]
	if code == "" {
		return
	}
	var body struct {
		Errors []struct{ Code, Message string }
	}
	if method == "HEAD" {
		if w.Body.Len() > 0 {
			d.t.Errorf("HEAD has the body %s", w.Body)
		}
	} else if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil || len(body.Errors) != 1 ||
		body.Errors[0].Code != code || body.Errors[0].Message == "" {
		d.t.Errorf("%d has the body %s, want code %s", status, w.Body, code)
	}
	if got := w.Header().Get("Content-Type"); got != "application/json" {
		d.t.Errorf("%d has Content-Type %q", status, got)
	}
	wantChallenge := ""
	if status == 401 {
		wantChallenge = `Basic realm="dfcache"`
	}
	if got := w.Header().Get("WWW-Authenticate"); got != wantChallenge {
		d.t.Errorf("%d has WWW-Authenticate %q, want %q", status, got, wantChallenge)
	}
	if retry, _ := strconv.Atoi(w.Header().Get("Retry-After")); (retry > 0) != (status == 429) {
		d.t.Errorf("%d has Retry-After %q", status, w.Header().Get("Retry-After"))
	}
}

const (
	manifest = "/v2/models/manifests/v1"
	upload   = "/v2/models/blobs/uploads/"
)

func TestRights(t *testing.T) {
	tests := []struct {
		read, write string
		// The status of ping, read and write for each sender.
		nobody, alice, bob, carol [3]int
	}{
		{"users", "users", [3]int{401, 401, 401}, [3]int{200, 200, 200}, [3]int{200, 200, 200}, [3]int{200, 200, 200}},
		{"users", "alice", [3]int{401, 401, 401}, [3]int{200, 200, 200}, [3]int{200, 200, 403}, [3]int{200, 200, 403}},
		{"alice", "bob", [3]int{401, 401, 401}, [3]int{200, 200, 403}, [3]int{200, 200, 200}, [3]int{403, 403, 403}},
		{"alice,bob", "bob", [3]int{401, 401, 401}, [3]int{200, 200, 403}, [3]int{200, 200, 200},
			[3]int{403, 403, 403}},
		{"anyone", "users", [3]int{401, 200, 401}, [3]int{200, 200, 200}, [3]int{200, 200, 200}, [3]int{200, 200, 200}},
		{"anyone", "alice, bob", [3]int{401, 200, 401}, [3]int{200, 200, 200}, [3]int{200, 200, 200},
			[3]int{200, 200, 403}},
		{"anyone", "anyone", [3]int{200, 200, 200}, [3]int{200, 200, 200}, [3]int{200, 200, 200},
			[3]int{200, 200, 200}},
	}
	for _, test := range tests {
		t.Run(test.read+" "+test.write, func(t *testing.T) {
			d := newDoor(t, test.read, test.write)
			for authorization, status := range map[string][3]int{
				"":             test.nobody,
				basic("", ""):  test.nobody, // of a client that has no login
				login("alice"): test.alice,
				login("bob"):   test.bob,
				login("carol"): test.carol,
			} {
				for _, path := range []string{"/v2/", "/v2"} {
					d.want(status[0], "GET", path, authorization)
				}
				for _, method := range []string{"GET", "HEAD"} {
					d.want(status[1], method, manifest, authorization)
				}
				for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "get"} {
					d.want(status[2], method, upload, authorization)
				}
			}
			// What is wrong is told even where nothing is needed.
			for _, authorization := range []string{
				basic("alice", "wrong"), basic("alice", ""), basic("", "secret-alice"),
				basic("mallory", "secret-alice"),
				login("Alice"), "Bearer secret", "Basic", "Basic !",
				"Basic " + base64.StdEncoding.EncodeToString([]byte("alice")),
			} {
				d.want(401, "GET", manifest, authorization)
				d.clock.advance(wrongInterval)
			}
		})
	}
}

// A web page can give its own host name the address of this host. What the owner's browser then
// sends has no more rights than anybody has.
func TestOwnerByName(t *testing.T) {
	hosts := map[string]bool{ // whether the owner is let in
		"127.0.0.1:65001":          true,
		"127.0.0.1":                true,
		"127.1.2.3:80":             true,
		"[::1]:65001":              true,
		"[::1]":                    true,
		"[::ffff:127.0.0.1]:65001": true,
		"localhost:65001":          true,
		"LOCALHOST":                true,
		"localhost.:65001":         true,
		"models.localhost:65001":   true,
		"evil.example:65001":       false,
		"localhost.evil.example":   false,
		"127.0.0.1.evil.example":   false,
		"evillocalhost":            false,
		"192.0.2.1:65001":          false,
		"0.0.0.0:65001":            false,
		"cache.example:65001":      false,
	}
	var access *Access
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		access.Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r)
	}))
	server.Config.ConnContext = loopback.ConnContext
	server.Start()
	defer server.Close()
	try := func(o AccessOptions, method, host string, want int) {
		t.Helper()
		var err error
		if access, err = NewAccess(o); err != nil {
			t.Fatal(err)
		}
		r, err := http.NewRequest(method, server.URL+manifest, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		response, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != want ||
			want == 421 && method != "HEAD" && !bytes.Contains(body, []byte(`"DENIED"`)) {
			t.Errorf("%s to %q, read for %s, write for %s: %d %s, %v; want %d", method, host, o.Read, o.Write,
				response.StatusCode, body, err, want)
		}
	}
	for host, local := range hosts {
		want := 421
		if local {
			want = 200
		}
		for _, method := range []string{"GET", "HEAD", "POST", "DELETE"} {
			try(AccessOptions{Read: Owner, Write: Owner}, method, host, want)
		}
		// Anyone may read by any name, and the owner writes by none that a page can have.
		try(AccessOptions{Read: Anyone, Write: Owner}, "GET", host, 200)
		try(AccessOptions{Read: Anyone, Write: Owner}, "PUT", host, want)
		try(AccessOptions{Read: Anyone, Write: Anyone}, "PUT", host, 200)
	}
	// A name that the registry was given is no page's.
	try(AccessOptions{Read: Owner, Write: Owner, Host: "cache.example"}, "PUT", "Cache.Example:65001", 200)
	try(AccessOptions{Read: Owner, Write: Owner, Host: "192.0.2.1"}, "PUT", "192.0.2.1:65001", 200)
	try(AccessOptions{Read: Owner, Write: Owner, Host: "cache.example"}, "PUT", "evil.example:65001", 421)
	// Nor is one that the certificate of the server has.
	secure := httptest.NewUnstartedServer(server.Config.Handler)
	secure.Config.ConnContext = loopback.ConnContext
	secure.StartTLS()
	defer secure.Close()
	server = secure
	try(AccessOptions{Read: Owner, Write: Owner}, "PUT", "cache.example", 200)
	// A request of no connection is nobody's.
	w := httptest.NewRecorder()
	access.Wrap(http.NotFoundHandler()).ServeHTTP(w, httptest.NewRequest("PUT", "http://localhost"+manifest, nil))
	if w.Code != 403 {
		t.Errorf("of no connection: %d", w.Code)
	}
}

// Without a password file there is nothing to ask for, and nothing is checked.
func TestNoPasswordFile(t *testing.T) {
	a, err := NewAccess(AccessOptions{Read: Anyone, Write: Anyone})
	if err != nil {
		t.Fatal(err)
	}
	d := &door{t: t, Access: a}
	for _, authorization := range []string{"", basic("alice", "x"), "Bearer x"} {
		d.want(200, "GET", "/v2/", authorization)
		d.want(200, "PUT", manifest, authorization)
	}
}

func TestNewAccess(t *testing.T) {
	good := filepath.Join(t.TempDir(), "htpasswd")
	if err := os.WriteFile(good, []byte(hashed(t, "alice", "x")), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := os.WriteFile(open, []byte(hashed(t, "alice", "x")), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		options AccessOptions
		want    error
		text    string
	}{
		{AccessOptions{}, digest.ErrInvalid, "without a password file nobody can log in"},
		{AccessOptions{Read: Anyone}, digest.ErrInvalid, "without a password file"},
		{AccessOptions{Htpasswd: good, Write: Anyone}, digest.ErrInvalid, "who may write may read"},
		{AccessOptions{Write: Owner}, digest.ErrInvalid, "without a password file nobody can log in"},
		{AccessOptions{Read: Owner, Write: Anyone}, digest.ErrInvalid, "who may write may read"},
		{AccessOptions{Htpasswd: good, Read: Owner}, digest.ErrInvalid,
			"with a password file the owner logs in as others do"},
		{AccessOptions{Htpasswd: good + "x"}, fs.ErrNotExist, good + "x"},
		{AccessOptions{Htpasswd: filepath.Dir(good)}, nil, "is a directory"},
		{AccessOptions{Htpasswd: open}, nil,
			"the permissions 0644 of " + open + " are too open: it is a secret; run: chmod 600 " + open},
	}
	for _, test := range tests {
		_, err := NewAccess(test.options)
		if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%+v: error %v, want %v with %q", test.options, err, test.want, test.text)
		}
	}

	var log bytes.Buffer
	who, err := ParseWho("alice,alcie")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewAccess(AccessOptions{
		Htpasswd: good, Write: who, Log: slog.New(slog.NewTextHandler(&log, nil))}); err != nil {
		t.Fatal(err)
	}
	if got := log.String(); strings.Count(got, "level=WARN") != 1 || !strings.Contains(got, "user=alcie") {
		t.Errorf("a name that is in no line was logged as: %s", got)
	}
}

func TestParseWho(t *testing.T) {
	for in, want := range map[string]string{
		"anyone": "anyone", "users": "users", "alice": "alice", "alice,bob": "alice,bob", " alice , bob ": "alice,bob",
		"": "", "alice,": "", ",": "", "alice,users": "", "anyone,bob": "", "alice:x": "",
	} {
		who, err := ParseWho(in)
		if want == "" {
			if !errors.Is(err, digest.ErrInvalid) {
				t.Errorf("%q: error %v", in, err)
			}
		} else if err != nil || who.String() != want || who.Anyone() != (in == "anyone") {
			t.Errorf("%q: got %s, %v, want %s", in, who, err, want)
		}
	}
	if !Users.has("alice") || Users.Anyone() || !Anyone.has("alice") || !Anyone.Anyone() {
		t.Error("Users are not users, or Anyone is not anyone")
	}
}

func TestParsePasswords(t *testing.T) {
	// Of "secret", made by htpasswd and by others.
	const hash = "05$/OK.fbVrR/bpIqNJ5ianF.CE5elHaaO4EbggVDjb8P19RukzXSM3e"
	for _, kind := range []string{"$2y$", "$2a$", "$2b$"} {
		p, err := parsePasswords([]byte("#\n\n \t\nalice:" + kind + hash + " \r\nbob:" + kind + hash))
		if err != nil || len(p.users) != 2 {
			t.Fatalf("%s: %v", kind, err)
		}
		for _, name := range []string{"alice", "bob"} {
			u, known := p.find(name)
			if !known || string(u.hash) != kind+hash {
				t.Errorf("%s: %s has the hash %s", kind, name, u.hash)
			}
		}
		// A name that is not there takes as long as one that is.
		u, known := p.find("mallory")
		if cost, err := bcrypt.Cost(u.hash); known || err != nil || cost != 5 {
			t.Errorf("%s: nobody has cost %d, %v", kind, cost, err)
		}
		if err := bcrypt.CompareHashAndPassword(u.hash, []byte("x")); err != bcrypt.ErrMismatchedHashAndPassword {
			t.Errorf("%s: the hash of nobody can't be compared: %v", kind, err)
		}
	}
	tests := []struct{ content, text string }{
		{"alice", "line 1: want a user, a colon"},
		{"# x\n\nalice:$2y$" + hash + "\nbob\n", "line 4: want a user"},
		{":$2y$" + hash, "line 1: want a user"},
		{"alice:secret", `line 1: the password of "alice" is not hashed with bcrypt: set it again with htpasswd -B`},
		{"alice:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "htpasswd -B"},
		{"alice:$apr1$hBeTJnhz$6S4o1ioGYTNhKwsbtPWrK0", "htpasswd -B"},
		{"alice:$5$zP4k$X5B3QpG0pWv7B2", "htpasswd -B"},
		{"alice:", "htpasswd -B"},
		{"alice:$2x$" + hash, "htpasswd -B"},
		{"alice:$2$" + hash, "htpasswd -B"},
		{"alice:$2y$" + hash[:55], "htpasswd -B"},
		{"alice:$2y$" + hash + "x", "htpasswd -B"},
		{"alice:$2y$" + hash + ":x", "htpasswd -B"},
		{"alice:$2y$03$" + hash[3:], "cost 3, want 4 to 17"},
		{"alice:$2y$31$" + hash[3:], "cost 31, want 4 to 17"},
		{"alice:$2y$" + hash + "\nalice:$2a$" + hash, `line 2: the user "alice" is there twice`},
	}
	for _, test := range tests {
		_, err := parsePasswords([]byte(test.content))
		if !errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%q: error %v, want %q", test.content, err, test.text)
		} else if strings.Contains(err.Error(), hash[3:20]) || strings.Contains(err.Error(), "secret") ||
			strings.Contains(err.Error(), "5en6G6") {
			t.Errorf("%q: the error tells what stands there: %v", test.content, err)
		}
	}
	if p, err := parsePasswords(nil); err != nil || len(p.users) != 0 {
		t.Errorf("nothing: %v, %v", p, err)
	}
	large := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(large, bytes.Repeat([]byte("\n"), maxPasswords+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readPasswords(large); !errors.Is(err, digest.ErrInvalid) || !strings.Contains(err.Error(), large) {
		t.Errorf("a large file: %v", err)
	}
}

// The file is read again when it has changed, but not on every request; what is
// wrong with it changes nothing.
func TestReload(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.want(200, "GET", manifest, login("alice"))
	d.want(200, "GET", manifest, login("bob"))

	changed := "# changed\n" + hashed(t, "alice", "new") + hashed(t, "dave", "secret-dave")
	d.write(changed)
	d.want(200, "GET", manifest, login("alice")) // too early to look
	d.clock.advance(lookInterval)
	d.want(401, "GET", manifest, login("alice")) // though it was remembered
	d.want(200, "GET", manifest, basic("alice", "new"))
	d.want(401, "GET", manifest, login("bob"))
	d.want(200, "GET", manifest, login("dave"))

	d.log.Reset()
	broken := map[string]func(){
		"not hashed with bcrypt":  func() { d.write("alice:secret") },
		"too open":                func() { d.write(changed); os.Chmod(d.path, 0o666) },
		"no such file":            func() { os.Remove(d.path) },
		"want a user":             func() { d.write("mallory\n") },
		"larger than 1048576 byt": func() { d.write(strings.Repeat("\n", maxPasswords+1)) },
	}
	for text, spoil := range broken {
		spoil()
		d.log.Reset()
		for range 3 {
			d.clock.advance(lookInterval)
			d.want(200, "GET", manifest, basic("alice", "new"))
			d.want(200, "GET", manifest, login("dave"))
		}
		if got := d.log.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, text) {
			t.Errorf("%s was logged as: %s", text, got)
		}
	}
	d.write(changed + hashed(t, "erin", "secret-erin"))
	d.clock.advance(lookInterval)
	d.want(200, "GET", manifest, login("erin"))
	if !strings.Contains(d.log.String(), "read the password file again") {
		t.Errorf("a good file after a broken one was logged as: %s", &d.log)
	}

	// Another file of the same size and time, as a rename brings it.
	info, err := os.Stat(d.path)
	if err != nil {
		t.Fatal(err)
	}
	other := d.path + ".new"
	if err := os.WriteFile(other, []byte(changed+hashed(t, "erin", "SECRET-erin")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(other, time.Time{}, info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, d.path); err != nil {
		t.Fatal(err)
	}
	d.clock.advance(lookInterval)
	d.want(401, "GET", manifest, login("erin"))
	d.want(200, "GET", manifest, basic("erin", "SECRET-erin"))
}

// A password that was right once is not hashed again. A hash that nothing can
// match shows that it was not asked.
func TestRemembered(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.want(200, "GET", manifest, login("alice"))
	u, _ := d.passwords.find("alice")
	hash := u.hash
	u.hash = d.passwords.nobody.hash
	d.want(200, "GET", manifest, login("alice"))
	d.want(401, "GET", manifest, basic("alice", "wrong")) // and did not make it forget
	d.want(200, "GET", manifest, login("alice"))
	u.hash = hash

	// It stays so when another user's password changes.
	content, err := os.ReadFile(d.path)
	if err != nil {
		t.Fatal(err)
	}
	d.write(string(content) + hashed(t, "dave", "x"))
	d.clock.advance(lookInterval)
	d.want(200, "GET", manifest, basic("dave", "x"))
	after, _ := d.passwords.find("alice")
	if after == u || !after.remembers(d.key, "secret-alice") {
		t.Error("a password was forgotten because another one came")
	}

	// What is remembered is not the password.
	if right := after.right.Load(); bytes.Contains(right[:], []byte("secret")) ||
		mac(make([]byte, 32), "secret-alice") == *right {
		t.Error("what is remembered does not depend on the key")
	}
	// Nobody is not remembered, even with the password of somebody.
	d.want(401, "GET", manifest, basic("mallory", "secret-alice"))
	if d.passwords.nobody.right.Load() != nil {
		t.Error("a wrong password was remembered")
	}
}

func TestLimit(t *testing.T) {
	d := newDoor(t, "anyone", "users")
	const here, other = "192.0.2.1:1000", "192.0.2.2:1000"
	from := func(remote, authorization string) *httptest.ResponseRecorder {
		return d.request("GET", manifest, authorization, remote)
	}
	wrong := basic("alice", "wrong")
	if code := from(here, login("bob")).Code; code != 200 {
		t.Fatalf("bob: %d", code)
	}
	for i := range maxWrong {
		// Each counts, whoever it is said to be, and from whatever port.
		name := []string{"alice", "mallory"}[i%2]
		if code := from("192.0.2.1:"+strconv.Itoa(i+1), basic(name, "wrong")).Code; code != 401 {
			t.Fatalf("wrong password %d: %d", i, code)
		}
	}
	logged := d.log.Len()
	w := from(here, wrong)
	if w.Code != 429 || w.Header().Get("Retry-After") != "3" ||
		!strings.Contains(w.Body.String(), `"TOOMANYREQUESTS"`) {
		t.Errorf("one too many: %d, Retry-After %q, %s", w.Code, w.Header().Get("Retry-After"), w.Body)
	}
	if d.log.Len() != logged {
		t.Error("what is over the limit fills the log")
	}
	for _, test := range []struct {
		remote, authorization string
		want                  int
	}{
		{here, login("alice"), 200}, // right, though others there were wrong
		{here, login("bob"), 200},   // known to be right
		{here, wrong, 429},
		{here, "", 200}, // no login
		{other, wrong, 401},
		{other, login("alice"), 200},
	} {
		if code := from(test.remote, test.authorization).Code; code != test.want {
			t.Errorf("%s with %q: %d, want %d", test.remote, test.authorization, code, test.want)
		}
	}

	// After the time that it says, there is room for one.
	d.clock.advance(3 * time.Second)
	if code := from(here, wrong).Code; code != 401 {
		t.Errorf("after waiting: %d", code)
	}
	if code := from(here, wrong).Code; code != 429 {
		t.Errorf("right after that: %d", code)
	}
	// Right ones take no room.
	d.clock.advance(3 * time.Second)
	for range 3 {
		d.passwords.users["carol"].right.Store(nil)
		if code := from(here, login("carol")).Code; code != 200 {
			t.Errorf("carol: %d", code)
		}
	}
}

// However many come at once, no more than the limit are told that they are wrong.
func TestLimitConcurrent(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.log = bytes.Buffer{}
	d.Access.log = slog.New(slog.DiscardHandler)
	var group sync.WaitGroup
	var looked atomic.Int32
	for range 5 * maxWrong {
		group.Go(func() {
			if d.request("GET", manifest, basic("alice", "wrong"), "").Code == 401 {
				looked.Add(1)
			}
		})
	}
	group.Wait()
	if got := looked.Load(); got != maxWrong {
		t.Errorf("%d wrong passwords were told so, want %d", got, maxWrong)
	}
	if n := len(d.lines.lines); n != 0 {
		t.Errorf("%d lines are left", n)
	}
}

// Whoever has not logged in since the daemon's start is let in, while others at the same
// address go on being wrong, and with them as many requests at once as clients send.
func TestRightAmongWrong(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.Access.log = slog.New(slog.DiscardHandler)
	for range maxWrong {
		d.request("GET", manifest, basic("alice", "wrong"), "")
	}
	var attackers, clients sync.WaitGroup
	over := make(chan struct{})
	for i := range 16 {
		attackers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-over:
					return
				default:
				}
				name := []string{"alice", "mallory", strconv.Itoa(n)}[i%3]
				if code := d.request("GET", manifest, basic(name, strconv.Itoa(n)), "").Code; code != 429 {
					t.Errorf("a wrong password over the limit: %d", code)
					return
				}
			}
		})
	}
	next := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for _, name := range []string{"alice", "bob", "carol"} {
		for range 10 {
			clients.Go(func() {
				r := httptest.NewRequest("GET", manifest, nil)
				r.Header.Set("Authorization", login(name))
				w := httptest.NewRecorder()
				if d.Wrap(next).ServeHTTP(w, r); w.Code != 200 {
					t.Errorf("%s: status %d", name, w.Code)
				}
			})
		}
	}
	clients.Wait()
	close(over)
	attackers.Wait()
}

// A line has an end, and whoever gives up is not in it.
func TestLines(t *testing.T) {
	var l lines
	leave, err := l.enter(t.Context(), line{}, 2)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() {
		_, err := l.enter(ctx, line{}, 2)
		waited <- err
	}()
	l.await(t, line{}, 2)
	gone, cancelGone := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancelGone()
	if _, err := l.enter(gone, line{}, 2); !errors.Is(err, errLimited) {
		t.Errorf("a third one: %v", err)
	}
	select {
	case err := <-waited:
		t.Fatalf("one goes on while another does: %v", err)
	default:
	}
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("one who gives up: %v", err)
	}
	leave()
	if len(l.lines) != 0 {
		t.Errorf("left are %v", l.lines)
	}
}

// await waits until so many are in a line.
func (l *lines) await(t *testing.T, at line, want int) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		in := 0
		l.mu.Lock()
		if turn := l.lines[at]; turn != nil {
			in = turn.in
		}
		l.mu.Unlock()
		if in == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d are in the line, want %d", in, want)
		}
	}
}

// Over the limit, an attempt waits for one of each other user at most, and no more than so many wait.
func TestLinesOfUsers(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.Access.log = slog.New(slog.DiscardHandler)
	const remote = "192.0.2.1:1000"
	from := netip.MustParsePrefix("192.0.2.1/32")
	for range maxWrong {
		d.request("GET", manifest, basic("alice", "wrong"), remote)
	}
	for range cap(d.hashes) {
		d.hashes <- struct{}{} // nobody gets on
	}
	next := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	send := func(authorization string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", manifest, nil)
		r.Header.Set("Authorization", authorization)
		r.RemoteAddr = remote
		w := httptest.NewRecorder()
		d.Wrap(next).ServeHTTP(w, r)
		return w
	}
	var attackers sync.WaitGroup
	refused := make(chan string, 2*maxInLine)
	for range 2 * maxInLine {
		attackers.Go(func() {
			w := send(basic("mallory", "wrong"))
			refused <- strconv.Itoa(w.Code) + " " + w.Header().Get("Retry-After")
		})
	}
	for i := range maxInLine { // at once, the others wait
		select {
		case answer := <-refused:
			if answer != "429 1" {
				t.Errorf("one too many in the line: %s", answer)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%d are refused, want %d", i, maxInLine)
		}
	}
	d.lines.await(t, line{from, d.passwords.nobody}, maxInLine)
	right := make(chan int, 1)
	go func() { right <- send(login("alice")).Code }()
	d.lines.await(t, line{from, d.passwords.users["alice"]}, 1)
	d.lines.await(t, line{from, nil}, 2)
	for range cap(d.hashes) {
		<-d.hashes
	}
	if code := <-right; code != 200 {
		t.Errorf("alice, among them: %d", code)
	}
	attackers.Wait()
}

// Each sender of requests has a share of its own: a user, who may come from anywhere, a user of this
// host, or a host.
func TestClientOf(t *testing.T) {
	d := newDoor(t, "users", "users")
	var who string
	next := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { who = clientOf(r) })
	for remote, authorization := range map[string]string{
		"192.0.2.1:1": login("alice"), "[2001:db8::1]:1": login("alice")} {
		r := httptest.NewRequest("GET", manifest, nil)
		r.RemoteAddr = remote
		r.Header.Set("Authorization", authorization)
		d.Wrap(next).ServeHTTP(httptest.NewRecorder(), r)
		if who != "user alice" {
			t.Errorf("alice at %s is %q", remote, who)
		}
	}
	for remote, want := range map[string]string{
		"192.0.2.1:1": "host 192.0.2.1", "[2001:db8::1]:1": "host 2001:db8::/64", "127.0.0.1:1": "host 127.0.0.1"} {
		r := httptest.NewRequest("GET", manifest, nil)
		r.SetBasicAuth("alice", "x") // which nobody has looked at
		r.RemoteAddr = remote
		if got := clientOf(r); got != want {
			t.Errorf("somebody at %s is %q, want %q", remote, got, want)
		}
	}
	server := httptest.NewUnstartedServer(next)
	server.Config.ConnContext = loopback.ConnContext
	server.Start()
	defer server.Close()
	response, err := server.Client().Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if want := "uid " + strconv.Itoa(os.Geteuid()); who != want {
		t.Errorf("this user is %q, want %q", who, want)
	}
}

// A client that begins with many requests at once is not taken for an attacker.
func TestManyRight(t *testing.T) {
	d := newDoor(t, "users", "users")
	var group sync.WaitGroup
	next := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	for range 5 * maxWrong {
		group.Go(func() {
			r := httptest.NewRequest("GET", manifest, nil)
			r.SetBasicAuth("alice", "secret-alice")
			w := httptest.NewRecorder()
			d.Wrap(next).ServeHTTP(w, r)
			if w.Code != 200 {
				t.Errorf("status %d", w.Code)
			}
		})
	}
	group.Wait()
	if n := len(d.wrong.senders); n != 0 {
		t.Errorf("%d senders are counted", n)
	}
}

func TestLimiterIsBounded(t *testing.T) {
	var l limiter
	var c clock
	address := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
	}
	attacker := address(1 << 20)
	for l.add(attacker, c.now()) == 0 {
	}
	for i := range maxSenders + 64 {
		if wait := l.add(address(i), c.now()); wait > 0 {
			t.Fatalf("sender %d has to wait %s", i, wait)
		}
		if len(l.senders) > maxSenders {
			t.Fatalf("%d senders are kept", len(l.senders))
		}
	}
	if l.full(attacker, c.now()) == 0 {
		t.Error("the one who was wrong most was dropped")
	}
	// Those that are done make room for others.
	c.advance(wrongInterval)
	if l.add(address(1<<21), c.now()); len(l.senders) != 2 {
		t.Errorf("%d senders are kept, want 2", len(l.senders))
	}
}

func TestRemote(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:80":                "192.0.2.1/32",
		"[::ffff:192.0.2.1]:80":       "192.0.2.1/32",
		"[2001:db8:1:2:3:4:5:6]:80":   "2001:db8:1:2::/64",
		"[fe80::1%eth0]:80":           "fe80::/64",
		"@":                           "invalid Prefix",
		"":                            "invalid Prefix",
		"[2001:db8:1:2:ffff::1]:1000": "2001:db8:1:2::/64",
	} {
		if got := remote(&http.Request{RemoteAddr: in}).String(); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

// The log says who tried from where, in bounds, and never the password.
func TestFailedLoginIsLogged(t *testing.T) {
	d := newDoor(t, "users", "users")
	d.request("GET", manifest, basic("alice", "pass-phrase"), "192.0.2.7:99")
	d.request("GET", manifest, basic("mal\nlory"+strings.Repeat("x", 10*maxLoggedName), "pass-phrase"), "192.0.2.7:99")
	got := d.log.String()
	for _, want := range []string{"login failed", "user=alice", "remote=192.0.2.7:99", `mal\nlory`} {
		if !strings.Contains(got, want) {
			t.Errorf("the log has no %q: %s", want, got)
		}
	}
	if strings.Contains(got, "phrase") || strings.Count(got, "\n") != 2 || len(got) > 4*maxLoggedName {
		t.Errorf("the log has %d bytes: %s", len(got), got)
	}
	d.log.Reset()
	d.want(200, "GET", manifest, login("alice"))
	if d.log.Len() > 0 {
		t.Errorf("a login that succeeds is logged as: %s", &d.log)
	}
}

// A request whose sender has gone does not wait for its turn to be hashed.
func TestGone(t *testing.T) {
	d := newDoor(t, "users", "users")
	for range cap(d.hashes) {
		d.hashes <- struct{}{}
	}
	r := httptest.NewRequest("GET", manifest, nil)
	r.SetBasicAuth("alice", "secret-alice")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := httptest.NewRecorder()
	d.Wrap(d).ServeHTTP(w, r.WithContext(ctx))
	if d.calls > 0 || d.log.Len() > 0 {
		t.Errorf("%d calls, log %s", d.calls, &d.log)
	}
}

// A client that is refused does not hold a connection by sending slowly, nor is an answer
// lost because the one before it was long ago.
func TestRefusedDeadlines(t *testing.T) {
	d := newDoor(t, "users", "users")
	for _, test := range []struct {
		body io.Reader
		want int // deadlines to read
	}{{nil, 0}, {strings.NewReader("body"), 1}} {
		w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		d.Wrap(d).ServeHTTP(w, httptest.NewRequest("PUT", manifest, test.body))
		if w.Code != 401 || w.read != test.want || w.write == 0 {
			t.Errorf("status %d, %d deadlines to read, %d to write", w.Code, w.read, w.write)
		}
	}
}

// deadlines counts what a connection is told.
type deadlines struct {
	*httptest.ResponseRecorder
	read, write int
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.read++
	return nil
}

func (d *deadlines) SetWriteDeadline(at time.Time) error {
	d.write++
	return nil
}

func ExampleParseWho() {
	who, err := ParseWho("alice,bob")
	fmt.Println(who, who.Anyone(), err)
	// Output: alice,bob false <nil>
}

// TestRefusedWhileSending: a client that is refused in the middle of a push hears why, also
// where it sends everything before it listens.
func TestRefusedWhileSending(t *testing.T) {
	d := newDoor(t, "users", "users")
	server := httptest.NewServer(d.Wrap(d))
	defer server.Close()
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const size = 64 << 20
	fmt.Fprintf(conn, "POST /v2/a/blobs/uploads/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", size)
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Errorf("send all of a push without a login: %v", err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("hear of a push without a login: %v", err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("push without a login: %s", answer.Status)
	}
}
