package registry

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
	"golang.org/x/time/rate"

	"github.com/dfcache/dfcache/blobstore/loopback"
	"github.com/dfcache/dfcache/digest"
)

// Who says who has a right: anyone, the owner, all users of a password file, which is the
// zero value, or some of them.
type Who struct {
	anyone, owner bool
	names         []string // of users; all of them where it is empty
}

// Anyone needs no password.
var Anyone = Who{anyone: true}

// Owner is the user of this process on this host, and root. Neither needs a password:
// the kernel says whose the connection is. The server wants [loopback.ConnContext].
var Owner = Who{owner: true}

// Users are all users of the password file.
var Users = Who{}

// ParseWho reads "anyone", "owner", "users", or names of users with commas between
// them. The error matches [digest.ErrInvalid].
func ParseWho(s string) (Who, error) {
	switch s {
	case "anyone":
		return Anyone, nil
	case "owner":
		return Owner, nil
	case "users":
		return Users, nil
	}
	var w Who
	for name := range strings.SplitSeq(s, ",") {
		name = strings.TrimSpace(name)
		switch {
		case name == "" || strings.Contains(name, ":"):
			return Who{}, fmt.Errorf("%w: %q is no name of a user: want anyone, users, or names with commas between "+
				"them, or owner", digest.ErrInvalid, name)
		case name == "anyone" || name == "owner" || name == "users":
			return Who{}, fmt.Errorf("%w: %q stands alone, not in a list of names", digest.ErrInvalid, name)
		}
		w.names = append(w.names, name)
	}
	return w, nil
}

// Anyone reports whether everybody has the right.
func (w Who) Anyone() bool { return w.anyone }

// NeedsPassword reports whether the right is for users of the password file.
func (w Who) NeedsPassword() bool { return !w.anyone && !w.owner }

// String returns what [ParseWho] reads.
func (w Who) String() string {
	switch {
	case w.anyone:
		return "anyone"
	case w.owner:
		return "owner"
	case len(w.names) == 0:
		return "users"
	}
	return strings.Join(w.names, ",")
}

// has reports whether a user of the password file has the right.
func (w Who) has(user string) bool {
	return w.anyone || len(w.names) == 0 || slices.Contains(w.names, user)
}

// AccessOptions says who may do what.
type AccessOptions struct {
	// Htpasswd is the path of a password file: lines of a user, a colon, and
	// the password's bcrypt hash ($2y$, $2a$ or $2b$), as htpasswd -B writes
	// them. Empty lines and those that begin with # are skipped. The file has
	// 1 MiB at most, and nobody but its owner may write it, nor others read it. "" is none: then nobody can log in.
	Htpasswd string
	// Read is who may GET and HEAD. A writer may read, too.
	Read Who
	// Write is who may do everything else.
	Write Who
	// Host is the name, or address, that the registry was given to be reached by; "" where
	// it was given none. The owner's rights are had under this name, localhost, the loopback
	// addresses and what the server has a certificate for. Any other name may be that of a web
	// page which has given it the address of this host, to have the owner's browser
	// take the registry for part of the page (DNS rebinding).
	Host string
	// Log gets failed logins and what becomes of a changed password file. The
	// default is to be silent.
	Log *slog.Logger
}

// Access is the access control of a registry: basic authentication (RFC 7617)
// against a password file, with separate rights to read and to write. It is
// safe for concurrent use.
//
// The password file is read again when it has changed, at most once a second.
// Where that fails, what was read before stays, and the failure is logged.
//
// Wrong passwords are limited for each remote address, which for IPv6 is a /64
// network: twenty at once, and one every three seconds after that.
type Access struct {
	path        string
	read, write Who
	host        string
	log         *slog.Logger
	now         func() time.Time

	key    []byte        // of the passwords that are remembered
	hashes chan struct{} // holds a value for each password that is being hashed
	wrong  limiter
	lines  lines

	mu        sync.Mutex // guards what follows
	passwords *passwords
	looked    time.Time // when the file was last looked at
	failed    string    // why the file could not be read again, as logged
}

// codeUnauthorized is the error code of the OCI distribution specification.
const codeUnauthorized = "UNAUTHORIZED"

const (
	// lookInterval is the least time between two looks at the password file.
	lookInterval = time.Second
	// refuseTimeout is how long a client can take to receive an answer that
	// refuses something.
	refuseTimeout = 10 * time.Second
	// maxLoggedName bounds, in bytes, what is logged of a name that a client sent.
	maxLoggedName = 128
)

// NewAccess reads the password file. It fails with an error that matches
// [digest.ErrInvalid] where a line of the file is no user with a bcrypt hash,
// where there is no file and a right needs a password, where there is one and a right
// is the owner's, or where anyone may write but not read.
func NewAccess(o AccessOptions) (*Access, error) {
	a := &Access{path: o.Htpasswd, read: o.Read, write: o.Write, host: o.Host, log: o.Log, now: time.Now}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.write.anyone && !a.read.anyone {
		return nil, fmt.Errorf("%w: who may write may read, too: let anyone read where anyone may write",
			digest.ErrInvalid)
	}
	if a.path == "" {
		if a.read.NeedsPassword() || a.write.NeedsPassword() {
			return nil, fmt.Errorf("%w: read is for %s and write for %s, but without a password file nobody can log in",
				digest.ErrInvalid, a.read, a.write)
		}
		return a, nil
	}
	if a.read.owner || a.write.owner {
		return nil, fmt.Errorf("%w: read is for %s and write for %s: with a password file the owner logs in as "+
			"others do", digest.ErrInvalid, a.read, a.write)
	}
	var err error
	if a.passwords, err = readPasswords(a.path); err != nil {
		return nil, err
	}
	for _, name := range slices.Concat(a.read.names, a.write.names) {
		if a.passwords.users[name] == nil {
			a.log.Warn("a user with rights is not in the password file", "user", name, "file", a.path)
		}
	}
	a.looked = a.now()
	a.key = make([]byte, sha256.Size)
	rand.Read(a.key) // never fails
	// Half of the processors are left to those who are logged in.
	a.hashes = make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2))
	return a, nil
}

// Wrap returns a handler that hands to next what its sender has the right to,
// and answers the rest itself:
//
//   - 401 and UNAUTHORIZED, with a challenge, where a login is needed, and where
//     one was sent that is wrong, needed or not
//   - 403 and DENIED where the user lacks the right, or the right is the owner's and
//     the connection another's
//   - 421 and DENIED where the right is the owner's, and the request is to a name that
//     anyone can have
//   - 429 and TOOMANYREQUESTS, with Retry-After, where too many wrong
//     passwords came from the same address, and this one is wrong, too
//
// Without a password file logins are not looked at.
//
// "GET /v2/" asks for a login where any right needs one, even where anyone may
// read: Docker, Podman, skopeo and CRI-O send passwords only to registries that
// ask for them there. Of those that have none, all but Docker's classic image
// store read on regardless. An empty name with an empty password is no login:
// that is what Podman, skopeo and CRI-O send then.
func (a *Access) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p := a.check(r); p != nil {
			refuse(w, r, p)
			return
		}
		if name, _, ok := r.BasicAuth(); ok && a.path != "" {
			r = r.WithContext(context.WithValue(r.Context(), userKey{}, name)) // the password was right
		}
		next.ServeHTTP(w, r)
	})
}

// check returns why a request gets no further, or nil.
func (a *Access) check(r *http.Request) *problem {
	if a.path == "" {
		if !a.right(r).owner {
			return nil
		}
		if !a.isNamed(r) {
			return newProblem(http.StatusMisdirectedRequest, codeDenied, "what only the owner of this registry may "+
				"do is asked of localhost or a loopback address, not of another name")
		}
		if !loopback.IsOwner(r) {
			a.log.Info("denied", "remote", r.RemoteAddr, "method", r.Method, "path", r.URL.Path)
			return newProblem(http.StatusForbidden, codeDenied, "this registry is for the user who runs it, and for "+
				"root on the same host; others need a user and a password, or that it lets anyone in")
		}
		return nil
	}
	name, password, sent := r.BasicAuth()
	if r.Header.Get("Authorization") == "" || sent && name == "" && password == "" {
		if a.needsLogin(r) {
			return challenge("a login is needed")
		}
		return nil
	}
	if !sent {
		return challenge("want a login with basic authentication")
	}
	switch wait, err := a.login(r, name, password); {
	case errors.Is(err, errLimited):
		return newProblem(http.StatusTooManyRequests, codeTooManyRequests,
			"too many failed logins from this address: wait, then try again").
			with("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	case err != nil: // or the sender has gone
		return challenge("the user or the password is wrong")
	case a.write.has(name) || isRead(r) && a.read.has(name):
		return nil
	default:
		a.log.Info("denied", "user", name, "method", r.Method, "path", r.URL.Path)
		return newProblem(http.StatusForbidden, codeDenied, "this user has no right to do that")
	}
}

// isNamed reports whether a request is to a name that no web page can have for its own.
func (a *Access) isNamed(r *http.Request) bool {
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return r.TLS != nil || loopback.IsNamed(host) || a.host != "" && strings.EqualFold(strings.Trim(host, "[]"), a.host)
}

// right returns who has the right that a request needs.
func (a *Access) right(r *http.Request) Who {
	if isRead(r) {
		return a.read
	}
	return a.write
}

func isRead(r *http.Request) bool { return r.Method == http.MethodGet || r.Method == http.MethodHead }

// needsLogin reports whether the request is refused to a client that has not logged in.
func (a *Access) needsLogin(r *http.Request) bool {
	if isRead(r) && r.URL.Path != "/v2/" && r.URL.Path != "/v2" {
		return !a.read.anyone
	}
	return !a.write.anyone
}

var (
	errWrong   = errors.New("wrong user or password")
	errLimited = errors.New("too many failed logins")
)

// login checks a password. It fails with errWrong, with errLimited and how long
// to wait, or because the request's context has ended.
//
// Wrong passwords are counted by where they come from. A place with too many of them
// may be one that many share, so that a right one from there is let in all the same: but its
// attempts are hashed one after the other, those for each user in turn, and a wrong one is not
// told so but to wait.
func (a *Access) login(r *http.Request, name, password string) (wait time.Duration, err error) {
	ctx, from := r.Context(), remote(r)
	user, known := a.current().find(name)
	if user.remembers(a.key, password) {
		return 0, nil
	}
	if wait = a.wrong.full(from, a.now()); wait == 0 {
		var right bool
		if right, wait, err = a.compare(ctx, from, user, password, true); err != nil {
			return 0, err
		}
		if right && known {
			return 0, nil
		}
		if wait == 0 {
			a.log.Warn("login failed", "user", name[:min(len(name), maxLoggedName)], "remote", r.RemoteAddr)
			return 0, errWrong
		}
	}
	leave, err := a.lines.enter(ctx, line{from, user}, maxInLine)
	if err != nil {
		return time.Second, err
	}
	defer leave()
	leaveAll, err := a.lines.enter(ctx, line{from, nil}, math.MaxInt) // one of each user at most
	if err != nil {
		return 0, err
	}
	defer leaveAll()
	right, _, err := a.compare(ctx, from, user, password, false)
	if err != nil {
		return 0, err
	}
	if right && known {
		return 0, nil
	}
	return wait, errLimited
}

// compare reports whether a password is that of a user. A wrong one is counted where that is asked
// for; where there is no room for it, compare says how long there is none.
func (a *Access) compare(
	ctx context.Context, from netip.Prefix, user *user, password string, counted bool,
) (right bool, wait time.Duration, err error) {
	select {
	case a.hashes <- struct{}{}:
		defer func() { <-a.hashes }()
	case <-ctx.Done():
		return false, 0, context.Cause(ctx)
	}
	// A client sends many requests at once: the one before may have been the same.
	if user.remembers(a.key, password) {
		return true, 0, nil
	}
	// A user that is not known takes the time of one that is, and has no right password.
	if bcrypt.CompareHashAndPassword(user.hash, []byte(password)) != nil {
		if counted {
			wait = a.wrong.add(from, a.now())
		}
		return false, wait, nil
	}
	user.remember(a.key, password)
	return true, 0, nil
}

// current returns the passwords of the file as it is, or as it was last good.
func (a *Access) current() *passwords {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	if now.Sub(a.looked) < lookInterval {
		return a.passwords
	}
	a.looked = now
	info, err := os.Stat(a.path)
	if err == nil && a.passwords.isOf(info) {
		a.failed = ""
		return a.passwords
	}
	var changed *passwords
	if err == nil {
		changed, err = readPasswords(a.path)
	}
	if err != nil {
		if err.Error() != a.failed {
			a.failed = err.Error()
			a.log.Error("the password file can't be read again: the passwords before stay", "error", a.failed)
		}
		return a.passwords
	}
	changed.keep(a.passwords)
	a.passwords, a.failed = changed, ""
	a.log.Info("read the password file again", "file", a.path, "users", len(changed.users))
	return changed
}

// remote returns the network that a request comes from, as far as it can be
// taken for one sender. What is not known is one, too.
func remote(r *http.Request) netip.Prefix {
	address, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	ip := address.Addr().Unmap()
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	prefix, _ := ip.WithZone("").Prefix(bits) // they are in range
	return prefix
}

// challenge is the answer that asks for a login.
func challenge(message string) *problem {
	return newProblem(http.StatusUnauthorized, codeUnauthorized, "%s", message).with(
		"WWW-Authenticate", `Basic realm="dfcache"`)
}

// refuse answers a request that gets no further.
func refuse(hw http.ResponseWriter, r *http.Request, p *problem) {
	p.send(newResponse(hw, r, refuseTimeout))
}

// limiter counts wrong passwords. Each sender has room for maxWrong, and gets
// one of them back every wrongInterval.
type limiter struct {
	mu      sync.Mutex
	senders map[netip.Prefix]*rate.Limiter
}

const (
	maxWrong      = 20
	wrongInterval = 3 * time.Second
	// maxSenders bounds the memory. Above it, the sender that was wrong the least goes
	// free: an attacker with so many addresses is not held up by a limit.
	maxSenders = 4096
)

// full returns how long a sender has to wait until there is room for one more,
// 0 where there is.
func (l *limiter) full(from netip.Prefix, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.senders[from]; s != nil {
		return time.Duration(max(0, 1-s.TokensAt(now)) * float64(wrongInterval))
	}
	return 0
}

// add counts one, where there is room. Otherwise it returns how long to wait.
func (l *limiter) add(from netip.Prefix, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.senders[from]
	if s == nil {
		if len(l.senders) >= maxSenders {
			l.dropOne(now)
		}
		if l.senders == nil {
			l.senders = map[netip.Prefix]*rate.Limiter{}
		}
		s = rate.NewLimiter(rate.Every(wrongInterval), maxWrong)
		l.senders[from] = s
	}
	r := s.ReserveN(now, 1)
	wait := r.DelayFrom(now)
	if wait > 0 {
		r.CancelAt(now)
	}
	return wait
}

// dropOne drops the sender that was wrong the least, and all that have all their room again.
func (l *limiter) dropOne(now time.Time) {
	var least netip.Prefix
	most := math.Inf(-1)
	for from, s := range l.senders {
		room := s.TokensAt(now)
		if room >= maxWrong {
			delete(l.senders, from)
		}
		if room > most {
			least, most = from, room
		}
	}
	delete(l.senders, least)
}

// line is a line of attempts: those for a user from a place, or, without a user,
// all from a place.
type line struct {
	from netip.Prefix
	user *user
}

// maxInLine bounds those in the line of a user.
const maxInLine = 64

// lines lets one at a time of each line go on, in the order in which they came.
type lines struct {
	mu    sync.Mutex
	lines map[line]*turn
}

type turn struct {
	going chan struct{} // holds a value while one goes on
	in    int           // that wait or go on
}

// enter waits until it is the caller's turn, who calls leave when it is over. It
// fails with errLimited where there are so many in the line, or with the cause of ctx.
func (l *lines) enter(ctx context.Context, at line, most int) (leave func(), err error) {
	l.mu.Lock()
	t := l.lines[at]
	if t == nil {
		t = &turn{going: make(chan struct{}, 1)}
		if l.lines == nil {
			l.lines = map[line]*turn{}
		}
		l.lines[at] = t
	}
	if t.in >= most {
		l.mu.Unlock()
		return nil, errLimited
	}
	t.in++
	l.mu.Unlock()
	out := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if t.in--; t.in == 0 {
			delete(l.lines, at)
		}
	}
	select {
	case t.going <- struct{}{}:
		return func() {
			<-t.going
			out()
		}, nil
	case <-ctx.Done():
		out()
		return nil, context.Cause(ctx)
	}
}

// mac binds a password to a key that only this process has.
func mac(key []byte, password string) [sha256.Size]byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(password))
	return [sha256.Size]byte(h.Sum(nil))
}
