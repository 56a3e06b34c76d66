package digest

import (
	"errors"
	"fmt"
)

// ErrMismatch is matched by every [MismatchError].
var ErrMismatch = errors.New("digest mismatch")

// ErrCorrupt is matched by every [CorruptError].
var ErrCorrupt = errors.New("corrupt")

// MismatchError says that content is not what its digest promised.
// errors.Is(err, [ErrMismatch]) holds for it.
type MismatchError struct {
	Want Digest // the digest that was asked for
	Got  Digest // the digest that the content has
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("digest mismatch: want %s, the content is %s", e.Want, e.Got)
}

// Is makes errors.Is(e, ErrMismatch) true.
func (e *MismatchError) Is(target error) bool { return target == ErrMismatch }

// CorruptError says that stored bytes are not those that were once verified
// and stored: a flipped bit, a missing byte, a missing file.
// errors.Is(err, [ErrCorrupt]) holds for it.
type CorruptError struct {
	Digest Digest // the blob
	Piece  int    // the first piece that is damaged, counted from 0; -1 where the whole blob is meant
	Reason string // what was found
}

func (e *CorruptError) Error() string {
	if e.Piece < 0 {
		return fmt.Sprintf("blob %s is corrupt: %s", e.Digest, e.Reason)
	}
	return fmt.Sprintf("blob %s is corrupt: piece %d: %s", e.Digest, e.Piece, e.Reason)
}

// Is makes errors.Is(e, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
