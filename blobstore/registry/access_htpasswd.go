package registry

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/dfcache/dfcache/digest"
	"github.com/dfcache/dfcache/p2p/secret"
)

// passwords is what a password file says.
type passwords struct {
	file   fs.FileInfo // as it was before it was read
	users  map[string]*user
	nobody *user // whose password is never right, and takes as long as that of others
}

// user is a user of the password file. It is safe for concurrent use.
type user struct {
	hash []byte // bcrypt
	// right is the mac of the password that was found to be right: bcrypt
	// takes more time than what is asked for.
	right atomic.Pointer[[sha256.Size]byte]
}

const (
	// maxPasswords bounds a password file, in bytes.
	maxPasswords = 1 << 20
	// maxCost is the highest cost of a bcrypt hash that is taken. It is also
	// what htpasswd makes at most. It takes seconds.
	maxCost = 17
	// minCost is the lowest that bcrypt knows.
	minCost = 4
)

var bcryptHash = regexp.MustCompile(`^\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}$`)

// readPasswords reads a password file, which is a secret as a key is. Errors name the file and the line, and
// nothing that stands there but the user.
func readPasswords(path string) (*passwords, error) {
	content, info, err := secret.Read(path, maxPasswords)
	if err != nil {
		return nil, fmt.Errorf("password file: %w", err)
	}
	p, err := parsePasswords(content)
	if err != nil {
		return nil, fmt.Errorf("password file %s: %w", path, err)
	}
	p.file = info
	return p, nil
}

func parsePasswords(content []byte) (*passwords, error) {
	p := &passwords{users: map[string]*user{}}
	highest, number := minCost, 0
	for line := range bytes.Lines(content) {
		number++
		text := strings.TrimSpace(string(line))
		if text == "" || text[0] == '#' {
			continue
		}
		invalid := func(format string, args ...any) error {
			return fmt.Errorf("%w: line %d: %s", digest.ErrInvalid, number, fmt.Sprintf(format, args...))
		}
		name, hash, ok := strings.Cut(text, ":")
		if !ok || name == "" {
			return nil, invalid("want a user, a colon, and a bcrypt hash, as htpasswd -B writes them")
		}
		match := bcryptHash.FindStringSubmatch(hash)
		if match == nil {
			return nil, invalid("the password of %q is not hashed with bcrypt: set it again with htpasswd -B", name)
		}
		cost, _ := strconv.Atoi(match[1]) // two digits
		if cost < minCost || cost > maxCost {
			return nil, invalid("the hash of %q has cost %d, want %d to %d: set the password again with htpasswd -B",
				name, cost, minCost, maxCost)
		}
		if p.users[name] != nil {
			return nil, invalid("the user %q is there twice", name)
		}
		p.users[name] = &user{hash: []byte(hash)}
		highest = max(highest, cost)
	}
	// No password is known that has this hash.
	p.nobody = &user{hash: fmt.Appendf(nil, "$2a$%02d$%s", highest, strings.Repeat(".", 53))}
	return p, nil
}

// isOf reports whether the file is still the one that was read.
func (p *passwords) isOf(file fs.FileInfo) bool {
	return secret.Same(p.file, file)
}

// find returns the user of that name, or one whose password is never right.
func (p *passwords) find(name string) (u *user, known bool) {
	if u := p.users[name]; u != nil {
		return u, true
	}
	return p.nobody, false
}

// keep takes over what is remembered of users that have not changed.
func (p *passwords) keep(old *passwords) {
	for name, u := range p.users {
		if before := old.users[name]; before != nil && bytes.Equal(before.hash, u.hash) {
			u.right.Store(before.right.Load())
		}
	}
}

func (u *user) remembers(key []byte, password string) bool {
	right := u.right.Load()
	if right == nil {
		return false
	}
	got := mac(key, password)
	return hmac.Equal(right[:], got[:])
}

func (u *user) remember(key []byte, password string) {
	right := mac(key, password)
	u.right.Store(&right)
}
